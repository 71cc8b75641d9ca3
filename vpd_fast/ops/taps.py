"""Deprecated names of `vpd_fast.ops.resampling`."""

from vpd_fast.ops.resampling import ResamplingWeights as Taps
from vpd_fast.ops.resampling import resize_weights as resize_taps
from vpd_fast.ops.resampling import window_weights as window_taps

__all__ = ["Taps", "resize_taps", "window_taps"]
