"""Fused operators. Importing this registers their contracts with PyTorch; native code is loaded by the first call."""

from vpd_fast.ops._dispatch import explain, registry
from vpd_fast.ops.cross_attention_maps import cross_attention_maps, cross_attention_maps_into
from vpd_fast.ops.cross_attention_maps_backward import cross_attention_maps_backward
from vpd_fast.ops.upsample_argmax import upsample_argmax, upsample_argmax_windows

__all__ = [
    "cross_attention_maps",
    "cross_attention_maps_backward",
    "cross_attention_maps_into",
    "explain",
    "registry",
    "upsample_argmax",
    "upsample_argmax_windows",
]
