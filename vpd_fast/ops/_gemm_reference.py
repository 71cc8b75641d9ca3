"""Plain PyTorch arithmetic of the operators that multiply by a packed weight: what is correct."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast.ops.packing import FLOAT8, PackedWeight, geglu_rows
from vpd_fast.ops.rounding import put, range_of_rows, rounded_rows


def concatenated(x: Tensor, x2: Tensor | None) -> Tensor:
    """cat([x, x2], -1) as float32, contiguous: in which order PyTorch sums would otherwise depend on the strides."""
    return (x if x2 is None else torch.cat([x.float(), x2.float()], dim=-1)).float().contiguous()


def prologue(a: Tensor, scale_shift: Tensor | None, silu: bool, input_scale: Tensor | None) -> Tensor:
    """Returns silu(a * scale_shift[:, 0] + scale_shift[:, 1]) * input_scale, each part if given. a: (B, ..., C)."""
    if scale_shift is not None:
        by_channel = scale_shift.unflatten(1, (2, *[1] * (a.dim() - 2)))
        a = a * by_channel[:, 0] + by_channel[:, 1]
    a = F.silu(a) if silu else a
    return a if input_scale is None else a * input_scale


def gemm(a: Tensor, weight: PackedWeight, ranges: Tensor | None = None, is_rounded: bool = False) -> Tensor:
    """Rows (B, ..., k) float32 times the weight, in its precision: (B, ..., n) float32.

    ranges: (B, 2, parts), of whole images, from which 8-bit rows then have their scale. is_rounded: rows are whole
    numbers already.
    """
    if weight.scales is None:
        return a.to(weight.dtype).float() @ weight.unpack()[0].T
    if is_rounded:
        return (a.double() @ weight.numbers()[0].double().T).float() * weight.scales[0]
    whole, scale = rounded_rows(a, weight.dtype, range_of_rows(a, ranges))
    if weight.dtype == FLOAT8:
        return (whole @ weight.numbers()[0].float().T) * (scale * weight.scales[0])
    exact = whole.double() @ weight.numbers()[0].double().T
    return exact.float() * (scale * weight.scales[0])


def epilogue(
    result: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    out: Tensor,
    rounding: Tensor | None = None,
) -> None:
    """Stores activation(result + bias) + residual, with `rounding` as int8."""
    result = result if bias is None else result + bias
    if activation == "geglu":
        order = geglu_rows(result.shape[-1] // 2).to(result.device)
        values, gates = result[..., torch.argsort(order)].chunk(2, -1)
        result = values * F.gelu(gates)
    elif activation:
        result = F.relu(result) if activation == "relu" else F.silu(result)
    put(out, result if residual is None else result + residual, rounding)
