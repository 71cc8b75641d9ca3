"""What `measure.py` measures, and how: items in order of value, each in steps, in a process that may be lost."""
