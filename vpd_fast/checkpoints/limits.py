"""How much a file may ask for: whatever is read or refused takes 5 s and 200 MB at most beside what its size explains.

Each limit is far above what checkpoints have, and small files that exceed one are made to.
"""

from __future__ import annotations

MAX_OPCODES = 2_000_000  # of the pickles in a file: each may make an object
MAX_TENSORS = 100_000  # that they rebuild
MAX_COPIES = 8_000_000  # items of lists and tuples that are copied although the file has them once
MAX_KEY_DEPTH, MAX_KEY_ITEMS = 4, 64  # of a tuple that is the key of a dictionary
MAX_TUPLE_KEYS = 2_000  # equal hashes of tuples can be made
MAX_KEY = 2**62  # of an int that is a key: larger ones can have equal hashes
MAX_MEMO = 2**32  # what binary pickles can number
MAX_NAME = 400  # characters of a class's or a weight's name
MAX_SMALL_ENTRY = 64  # bytes of the entries of an archive that only hold a word
MAX_DIRECTORY = 2**24  # bytes of the list of entries of an archive
MAX_SHARED = 2**27  # bytes of tensors beyond the size of the file, since tensors may share memory or repeat elements
