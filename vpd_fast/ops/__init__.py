"""Fused operators. Importing this registers their contracts with PyTorch; native code is loaded by the first call."""

from vpd_fast.ops._dispatch import explain, registry
from vpd_fast.ops.conv2d import conv2d
from vpd_fast.ops.cross_attention_maps import cross_attention_maps, cross_attention_maps_into
from vpd_fast.ops.cross_attention_maps_backward import cross_attention_maps_backward
from vpd_fast.ops.group_norm_affine import group_norm_affine
from vpd_fast.ops.linear import linear
from vpd_fast.ops.packing import PackedWeight, geglu_rows
from vpd_fast.ops.self_attention import self_attention
from vpd_fast.ops.statistics import Statistics
from vpd_fast.ops.upsample_argmax import upsample_argmax, upsample_argmax_windows
from vpd_fast.ops.winograd_conv2d import winograd_conv2d, winograd_weight

__all__ = [
    "PackedWeight",
    "Statistics",
    "conv2d",
    "cross_attention_maps",
    "cross_attention_maps_backward",
    "cross_attention_maps_into",
    "explain",
    "geglu_rows",
    "group_norm_affine",
    "linear",
    "registry",
    "self_attention",
    "upsample_argmax",
    "upsample_argmax_windows",
    "winograd_conv2d",
    "winograd_weight",
]
