"""Deprecated name of `vpd_fast.ops.packing`, for one version."""

import warnings

from vpd_fast.ops.packing import *  # noqa: F403

warnings.warn("vpd_fast.ops._packing has become vpd_fast.ops.packing", DeprecationWarning, stacklevel=2)
