"""What the package does, shown in under a minute without any download: three tasks on scenes of the shapes world."""

from vpd_fast.demo.run import Demo, TaskReport, run_demo
from vpd_fast.demo.sheet import contact_sheet

__all__ = ["Demo", "TaskReport", "contact_sheet", "run_demo"]
