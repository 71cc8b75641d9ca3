"""Weights with NaN or infinities: one of them makes every output NaN, which labels and thresholds would hide."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has no NaN and no infinity; one pass without further memory where that is so.

    A tensor without memory has no values, and so none of them.
    """
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.itemsize == 1:  # float8 has no sums
        tensor = tensor.float()
    # A sum is finite only if all are. Where finite numbers add up to infinity, each is looked at.
    return bool(tensor.sum().isfinite()) or bool(torch.isfinite(tensor).all())


def why_not_finite(tensor: Tensor, stored: Tensor) -> str:
    """Return what is wrong with a tensor that is not `all_finite`, converted from what was `stored`."""
    if all_finite(stored):
        dtype = str(tensor.dtype).removeprefix("torch.")
        largest = float(stored.abs().max())
        return f"has values up to {largest:.3g}, which {dtype} cannot hold; choose bfloat16 or float32"
    count = int((~torch.isfinite(stored)).sum())
    return f"has {count} of {stored.numel()} values that are NaN or infinite; the weights are damaged"
