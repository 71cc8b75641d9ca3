"""GroupNorm as one scale and one shift per channel, which the layer behind it applies while it reads its input.

The statistics are all that is left of the normalisation: nothing is written but two numbers per channel, and the
activations are read once. Float32 sums are taken about a value near the block they are of, and merged in float64 (Chan,
Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979), so a mean that is
large compared to the deviation costs no accuracy. A NaN or an infinity makes NaN of the scale and shift of its group,
and so do deviations from the mean beyond 1e18, whose squares are beyond float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vpd_fast import _native
from vpd_fast.ops._checks import check, check_impl, check_tensor
from vpd_fast.ops._dispatch import Implementation, Op, register
from vpd_fast.ops._triton import triton_missing

DTYPES = (torch.float32, torch.bfloat16)


def group_norm_affine(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, x2: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """Scale and shift per channel such that GroupNorm(x) * weight + bias = x * scale + shift.

    x: (B, H, W, C1) float32 or bfloat16; x2: (B, H, W, C2) likewise, maybe of the other dtype: the channels are then
        those of torch.cat([x, x2], -1), without the copy. Rows evenly spaced and channels next to each other are read
        in place; other strides are copied.
    weight, bias: (C,) float32. groups: divides C. eps: added to the variance, as in torch.nn.GroupNorm.
    impl: "auto", "cpu", "triton" or "reference".
    Returns (B, 2, C) float32: [:, 0] is the scale, [:, 1] the shift. Inference only. Raises InputError for a wrong
    shape, dtype, device, number of groups or impl, and for an input that requires gradients while they are recorded.
    """
    arguments = _check(x, weight, bias, groups, eps, x2)
    return torch.ops.vpd_fast.group_norm_affine(*arguments, check_impl(impl))


def _check(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, x2: Tensor | None = None) -> tuple:
    check_tensor("x", x, "B H W C1", DTYPES, may_be_empty="B")
    batch, height, width, channels = x.shape
    named = {"weight": weight, "bias": bias}
    if x2 is not None:
        check_tensor("x2", x2, "B H W C2", DTYPES, may_be_empty="B", B=batch, H=height, W=width)
        channels += x2.shape[3]
        named["x2"] = x2
    check_tensor("weight", weight, "C", (torch.float32,), C=channels)
    check_tensor("bias", bias, "C", (torch.float32,), C=channels)
    for name, tensor in named.items():
        check(tensor.device == x.device, f"{name} must be on {x.device} as x is, got {tensor.device}")
    check(isinstance(groups, int) and groups > 0, f"groups must be a positive integer, got {groups!r}")
    check(channels % groups == 0, f"groups must divide the {channels} channels, got {groups}")
    check(
        isinstance(eps, (int, float)) and math.isfinite(eps) and eps >= 0,
        f"eps must be a finite number that is not negative, got {eps!r}",
    )
    for name, tensor in {"x": x, **named}.items():
        check(
            not (torch.is_grad_enabled() and tensor.requires_grad),
            f"{name} requires gradients, which group_norm_affine does not compute: call it under torch.no_grad()",
        )
    return x, weight, bias, groups, float(eps), x2


def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], 2, weight.shape[0]), dtype=torch.float32)


def _reference(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, x2: Tensor | None) -> Tensor:
    if x.shape[0] == 0:  # var_mean warns
        return _fake(x, weight)
    sources = (x,) if x2 is None else (x, x2)
    joined = torch.cat([source.flatten(1, 2).double() for source in sources], dim=2)
    grouped = joined.unflatten(2, (groups, -1))  # images, positions, groups, channels
    variance, mean = torch.var_mean(grouped, dim=(1, 3), correction=0)
    scale = weight.double().unflatten(0, (groups, -1)) * (variance + eps).rsqrt()[:, :, None]
    shift = bias.double().unflatten(0, (groups, -1)) - mean[:, :, None] * scale
    return torch.stack([scale.flatten(1), shift.flatten(1)], dim=1).float()


def _cpu_refuses(x: Tensor, *_: Any) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}, not on the CPU"
    return _native.why_missing("_C")


def _cpu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, x2: Tensor | None) -> Tensor:
    out = _fake(x, weight)
    sources = [_rows(source) for source in (x, x2) if source is not None]
    weight, bias = weight.contiguous(), bias.contiguous()
    _native.load("_C").group_norm_affine(
        [
            (rows.data_ptr(), str(rows.dtype).removeprefix("torch."), rows.shape[2], rows.stride()[:2])
            for rows in sources
        ],
        tuple(sources[0].shape[:2]),
        groups,
        eps,
        (weight.data_ptr(), bias.data_ptr(), out.data_ptr()),
        torch.get_num_threads(),
        _native.isa(),
    )
    return out


def _triton_refuses(x: Tensor, *_: Any) -> str | None:
    return triton_missing(x)


def _triton(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, x2: Tensor | None) -> Tensor:
    from vpd_fast.kernels import group_norm_affine as kernels

    out = _fake(x, weight)
    if out.numel():
        sources = [_rows(source) for source in (x, x2) if source is not None]
        kernels.forward(sources, weight.contiguous(), bias.contiguous(), groups, eps, out)
    return out


def _rows(x: Tensor) -> Tensor:
    """(B, H * W, C) with channels next to each other; the memory of x where its strides allow."""
    rows = x.flatten(1, 2)
    return rows if rows.stride(2) == 1 or rows.shape[2] == 1 else rows.contiguous()


register(
    Op(
        name="group_norm_affine",
        arguments="Tensor x, Tensor weight, Tensor bias, int groups, float eps, Tensor? x2",
        returns="Tensor",
        fake=_fake,
        check=_check,
        implementations=(
            Implementation("cpu", _cpu, _cpu_refuses),
            Implementation("triton", _triton, _triton_refuses),
            Implementation("reference", _reference),
        ),
    )
)
