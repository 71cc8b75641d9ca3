"""Deprecated name of `vpd_fast.bench`; its modules are found under this name, too."""

import warnings

from vpd_fast import bench

warnings.warn("vpd_fast.benchmark is vpd_fast.bench now", DeprecationWarning, stacklevel=2)
__path__ = bench.__path__
