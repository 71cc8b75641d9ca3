"""GroupNorm as one scale and one shift per channel, which the layer behind it applies while it reads its input.

The statistics are all that is left of the normalisation: nothing is written but two numbers per channel, and the
activations are read once. Float32 sums are taken about a value near the block they are of, and merged in float64 (Chan,
Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979), so a mean that is
large compared to the deviation costs no accuracy. A NaN or an infinity makes NaN of the scale and shift of its group,
and so do deviations from the mean beyond 1e18, whose squares are beyond float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast import _native
from vpd_fast.ops._checks import FLOATS, check, check_eps, check_flag, check_places, check_tensor, check_value
from vpd_fast.ops._dispatch import WRITTEN, Implementation, Op, SymInt, register
from vpd_fast.ops._layout import contiguous, dtype_name, rows_contiguous
from vpd_fast.ops.availability import triton_missing
from vpd_fast.ops.statistics import Statistics, check_statistics, given

SILU_ARGMIN, SILU_MIN = -1.2784645, -0.27846456  # where SiLU is least, and that value, rounded down


def group_norm_affine(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    x2: Tensor | None = None,
    *,
    statistics: Statistics | None = None,
    statistics2: Statistics | None = None,
    ranges: Tensor | None = None,
    silu: bool = False,
    scale: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Scale and shift per channel such that GroupNorm(x) * weight + bias = x * scale + shift.

    x: (B, H, W, C1) float32, bfloat16 or float16; x2: (B, H, W, C2) likewise, maybe of another dtype: the channels are
        then those of torch.cat([x, x2], -1), without the copy. Rows evenly spaced and channels next to each other are
        read in place; other strides are copied.
    weight, bias: (C,) float32. groups: divides C. eps: added to the variance, as in torch.nn.GroupNorm.
    statistics, statistics2: of x and x2, if the operator that made them found them; then they are not read.
    ranges: (B, 2, groups) float32, what to fill with bounds of what comes next, by group: ranges[:, 0] is at most, and
        ranges[:, 1] at least, each number of activation(x * scale + shift) * `scale`, where the activation is SiLU or
        none, as `silu` says, and `scale` is (C,) float32 or None. NaN, if x is not finite.
    impl: "auto", "cpu", "triton" or "reference".
    Returns (B, 2, C) float32: [:, 0] is the scale, [:, 1] the shift. Inference only. Raises InputError for a wrong
    shape, dtype, device, number of groups or impl, and for an input that requires gradients while they are recorded.
    """
    check_tensor("x", x, "B H W C1", FLOATS, may_be_empty="B")
    batch, height, width, channels = x.shape
    named: dict[str, Tensor | None] = {"weight": weight, "bias": bias}
    known = check_statistics("statistics", statistics, batch, height * width, channels, x.device)
    if x2 is not None:
        check_tensor("x2", x2, "B H W C2", FLOATS, may_be_empty="B", B=batch, H=height, W=width)
        channels += x2.shape[3]
        named["x2"] = x2
    check(x2 is not None or statistics2 is None, "statistics2 must be None as x2 is")
    known2 = check_statistics("statistics2", statistics2, batch, height * width, channels - x.shape[3], x.device)
    check_tensor("weight", weight, "C", FLOATS[:1], C=channels)
    check_tensor("bias", bias, "C", FLOATS[:1], C=channels)
    check_value(isinstance(groups, int) and groups > 0, "groups must be a positive integer", groups)
    check(channels % groups == 0, f"groups must divide the {channels} channels, got {groups}")
    eps = check_eps(eps)
    if ranges is not None:
        check_tensor("ranges", ranges, "B 2 groups", FLOATS[:1], "B", **{"B": batch, "2": 2, "groups": groups})
        check(ranges.is_contiguous(), f"ranges must be contiguous, got strides {ranges.stride()}")
    if scale is not None:
        check_tensor("scale", scale, "C", FLOATS[:1], C=channels)
    check_flag("silu", silu)
    named |= {"statistics": known[0], "statistics2": known2[0], "ranges": ranges, "scale": scale}
    check_places("group_norm_affine", x.device, {"x": x, **named})
    arguments = GroupNormAffineArguments(
        x, weight, bias, groups, eps, x2, *known, *known2, ranges=ranges, silu=silu, scale=scale
    )
    return GROUP_NORM_AFFINE(arguments, impl)


@dataclass(frozen=True)
class GroupNormAffineArguments:
    """Arguments of the operator; see the public function.

    statistics, statistics2: `Statistics.data` of x and x2, or None; run, run2: the length of their runs of positions.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    groups: int
    eps: float
    x2: Tensor | None
    statistics: Tensor | None
    run: SymInt
    statistics2: Tensor | None
    run2: SymInt
    ranges: Annotated[Tensor | None, WRITTEN]
    silu: bool
    scale: Tensor | None

    def public(self) -> dict[str, Any]:
        """Return the arguments of the public function that makes these."""
        names = ("x", "weight", "bias", "groups", "eps", "x2", "ranges", "silu", "scale")
        known = {"statistics": given(self.statistics, self.run), "statistics2": given(self.statistics2, self.run2)}
        return {name: getattr(self, name) for name in names} | known

    @property
    def sources(self) -> list[Tensor]:
        """x, and x2 if there is one."""
        return [self.x] if self.x2 is None else [self.x, self.x2]


def _fake(call: GroupNormAffineArguments) -> Tensor:
    return call.x.new_empty((call.x.shape[0], 2, call.weight.shape[0]), dtype=torch.float32)


def _reference(call: GroupNormAffineArguments) -> Tensor:
    if call.x.shape[0] == 0:  # var_mean warns
        return _fake(call)
    mean, variance, low, high = _statistics(call)
    by_group = (call.groups, -1)
    scale = call.weight.double().unflatten(0, by_group) * (variance + call.eps).rsqrt()[:, :, None]
    shift = call.bias.double().unflatten(0, by_group) - mean[:, :, None] * scale
    scale, shift = scale.flatten(1).float(), shift.flatten(1).float()
    if call.ranges is not None:
        not_finite = ~(scale.isfinite() & shift.isfinite()).unflatten(1, by_group).all(2)
        bounds = _next_range((low * scale + shift).float(), (high * scale + shift).float(), call.silu, call.scale)
        call.ranges[:, 0] = bounds[0].unflatten(1, by_group).amin(2).masked_fill(not_finite, torch.nan)
        call.ranges[:, 1] = bounds[1].unflatten(1, by_group).amax(2).masked_fill(not_finite, torch.nan)
    return torch.stack([scale, shift], dim=1)


def _statistics(call: GroupNormAffineArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns mean and variance of the groups (B, groups) in float64, minimum and maximum of the channels (B, C).

    They follow from the statistics of a source where these are given, otherwise from its numbers.
    """
    parts = []
    known = (call.statistics, call.run), (call.statistics2, call.run2)
    for x, (data, run) in zip(call.sources, known, strict=False):
        positions = x.shape[1] * x.shape[2]
        if data is None:
            rows = x.flatten(1, 2)
            variance, mean = torch.var_mean(rows.double(), dim=1, correction=0)
            parts.append((mean, variance, rows.amin(1).float(), rows.amax(1).float()))
            continue
        counts = torch.full((data.shape[1], 1), run, dtype=torch.float64, device=x.device)
        counts[-1] = positions - (data.shape[1] - 1) * run
        means = data[:, :, 0].double() + data[:, :, 1].double()
        mean = (means * counts).sum(1) / positions
        squares = (data[:, :, 2].double() + counts * (means - mean[:, None]).square()).sum(1)
        parts.append((mean, squares / positions, data[:, :, 3].amin(1), data[:, :, 4].amax(1)))
    mean, variance, low, high = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    means = mean.unflatten(1, (call.groups, -1))
    mean = means.mean(2)
    variance = (variance.unflatten(1, (call.groups, -1)) + (means - mean[:, :, None]).square()).mean(2)
    return mean, variance, low, high


def _next_range(first: Tensor, second: Tensor, silu: bool, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of activation(numbers) * scale over the numbers between `first` and `second`."""
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    if silu:
        inside = (low < SILU_ARGMIN) & (high > SILU_ARGMIN)  # SiLU's minimum lies between them
        first, second = F.silu(low), F.silu(high)
        low, high = torch.minimum(first, second).masked_fill(inside, SILU_MIN), torch.maximum(first, second)
    if scale is not None:
        low, high = torch.minimum(low * scale, high * scale), torch.maximum(low * scale, high * scale)
    return low, high


def _cpu_refuses(call: GroupNormAffineArguments) -> str | None:
    if call.x.device.type != "cpu":
        return f"x is on {call.x.device}, not on the CPU"
    if any(x.dtype == torch.float16 for x in call.sources):
        return "no native kernel computes in float16"
    if any(t is not None for t in (call.statistics, call.statistics2, call.ranges)):
        return "statistics and ranges are for kernels that round whole images"
    return _native.why_missing("_C")


def _cpu(call: GroupNormAffineArguments) -> Tensor:
    out = _fake(call)
    sources = [rows_contiguous(source) for source in call.sources]
    weight, bias = call.weight.contiguous(), call.bias.contiguous()
    _native.run(
        "group_norm_affine",
        [(rows.data_ptr(), dtype_name(rows), rows.shape[2], rows.stride()[:2]) for rows in sources],
        tuple(sources[0].shape[:2]),
        call.groups,
        call.eps,
        (weight.data_ptr(), bias.data_ptr(), out.data_ptr()),
        torch.get_num_threads(),
        _native.isa(),
    )
    return out


def _triton_refuses(call: GroupNormAffineArguments) -> str | None:
    reason = triton_missing(call.x)
    if reason is not None:
        return reason
    from vpd_fast.kernels import group_norm_affine as kernels

    return kernels.refuse(call.weight.numel(), call.groups)


def _triton(call: GroupNormAffineArguments) -> Tensor:
    from vpd_fast.kernels import group_norm_affine as kernels

    out = _fake(call)
    if out.numel():
        known = [(call.statistics, call.run), (call.statistics2, call.run2)]
        kernels.forward(
            [rows_contiguous(source) for source in call.sources],
            [None if data is None else (data, run) for data, run in known],
            call.weight.contiguous(),
            call.bias.contiguous(),
            call.groups,
            call.eps,
            out,
            ranges=call.ranges,
            silu=call.silu,
            scale=contiguous(call.scale),
        )
    return out


GROUP_NORM_AFFINE = register(
    Op(
        "group_norm_affine",
        GroupNormAffineArguments,
        public=group_norm_affine,
        returns="Tensor",
        fake=_fake,
        implementations=(
            Implementation("cpu", _cpu, _cpu_refuses),
            Implementation("triton", _triton, _triton_refuses),
            Implementation("reference", _reference),
        ),
    )
)
