"""What mmengine writes into its checkpoints beside weights, for PyTorch's loader that runs no code from a file.

mmengine 0.10 calls torch.load without `weights_only`, which since PyTorch 2.6 refuses the curves in what mmengine
itself saved, so that no run could be resumed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch

from vpd_fast.errors import CheckpointError, brief


def allow_checkpoints_of_mmengine() -> None:
    """Let torch.load, as mmengine calls it, read curves: HistoryBuffer with NumPy arrays of numbers."""
    makers: tuple[Any, ...] = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    dtypes = (type(np.dtype(name)) for name in ("bool", "int32", "int64", "float32", "float64"))
    allowed: list[Any] = [import_module("mmengine.logging").HistoryBuffer, np.ndarray, np.dtype, *dtypes]
    for core in ("core", "_core"):  # the names that NumPy 1 and 2 write
        allowed += [(maker, f"numpy.{core}.multiarray.{maker.__name__}") for maker in makers]
    # Files say `getattr(HistoryBuffer, "mean")`; getattr itself would reach everything.
    torch.serialization.add_safe_globals([*allowed, (_statistic, "builtins.getattr")])


def _statistic(owner: Any, name: str) -> Any:
    """The method `name` of HistoryBuffer. Raises CheckpointError for everything else."""
    buffer = import_module("mmengine.logging").HistoryBuffer
    if owner is not buffer or name not in ("min", "max", "current", "mean"):
        raise CheckpointError(
            f"the checkpoint asks for {brief(name)} of {brief(owner)}, which no checkpoint of mmengine needs: it may "
            "be hostile; load its weights alone, by VPD.from_checkpoint"
        )
    return getattr(buffer, name)
