"""Fused operators. Importing this registers their contracts with PyTorch; native code is loaded by the first call."""

from vpd_fast.ops._dispatch import explain, registry
from vpd_fast.ops.upsample_argmax import upsample_argmax, upsample_argmax_windows

__all__ = ["explain", "registry", "upsample_argmax", "upsample_argmax_windows"]
