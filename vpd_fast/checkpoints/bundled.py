"""Deprecated: use `vpd_fast.bundled`, and `vpd_fast.checkpoints.save` for `write_bundled`."""

from vpd_fast.bundled import *  # noqa: F403
from vpd_fast.bundled import asset, is_bundled, pack, unpack, unpacked_folder  # noqa: F401
from vpd_fast.checkpoints.save import write_bundled  # noqa: F401
