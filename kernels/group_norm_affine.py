"""Statistics of GroupNorm as a scale and a shift per channel.

`_statistics.py` finds statistics of runs of positions, or the product that made the activations did. `_merge_kernel`, a
program per image and group, puts those of the group's channels together in float64, reading each once: sums of
deviations and of their squares about the mean of the group's first run (Chan, Golub, LeVeque, 1979). That run is one of
those that make the variance, so no square is much larger than the sum. Partial results are per channel, so a group may
have channels of both sources, and the order of all sums is fixed: no atomics.

A program waits for memory, not for arithmetic, so all runs of up to 2048 numbers of a plane are on their way together.

From the least and the largest number of each channel follows where what comes next will be: scale and shift are
monotone, and SiLU has one minimum. Kernels that round to 8 bits need that range.
"""

import torch
import triton
import triton.language as tl

from vpd_fast.kernels._common import launch, multiprocessors
from vpd_fast.kernels._statistics import CHANNELS, PLANES, POSITIONS, partial

MAX_MERGED = 2048  # partial results of a plane at a time
MERGED_PER_WARP = 256  # of them
MAX_GROUP_CHANNELS = 8192  # channels, which a program has in registers
SILU_ARGMIN = tl.constexpr(-1.2784645)  # where SiLU is least
SILU_MIN = tl.constexpr(-0.27846456)  # and how much it is there, rounded down


@triton.jit
def _plane(source, runs, width, source2, runs2, width2, rows, columns, inside, plane):
    """A plane of statistics of the channels `columns` of both sources, zero outside."""
    first = inside if source2 is None else inside & (columns < width)
    places = rows[:, None] * (PLANES * width) + plane * width + columns[None, :]
    value = tl.load(source + places, mask=(rows < runs)[:, None] & first[None, :], other=0.0)
    if source2 is not None:
        second = inside & (columns >= width)
        places = rows[:, None] * (PLANES * width2) + plane * width2 + columns[None, :] - width
        value += tl.load(source2 + places, mask=(rows < runs2)[:, None] & second[None, :], other=0.0)
    return value


@triton.jit
def _counts(rows, columns, positions, run, runs, width, source2, run2, runs2):
    """Numbers behind each statistic (rows, columns) in float64, 0 beyond the last run; (rows, 1) of one source."""
    count = tl.where(rows < runs, tl.minimum(positions - rows * run, run), 0)[:, None]
    if source2 is not None:
        count2 = tl.where(rows < runs2, tl.minimum(positions - rows * run2, run2), 0)[:, None]
        count = tl.where((columns < width)[None, :], count, count2)
    return count.to(tl.float64)


@triton.jit
def _mean(source, runs, width, source2, runs2, width2, rows, columns, inside):
    """Means of statistics (rows, columns) in float64, zero outside."""
    mean = _plane(source, runs, width, source2, runs2, width2, rows, columns, inside, 0).to(tl.float64)
    return mean + _plane(source, runs, width, source2, runs2, width2, rows, columns, inside, 1).to(tl.float64)


@triton.jit(do_not_specialize=("run", "runs", "run2", "runs2", "positions", "groups"))
def _merge_kernel(
    source, source_b, run, runs, width, source2, source2_b, run2, runs2, width2, positions, weight, bias, out,
    ranges, next_scale, eps, groups, SILU: tl.constexpr, RUNS: tl.constexpr, ONCE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Axis 0: images x groups. RUNS: runs at a time, all of them if ONCE; WIDTH: channels of a group, rounded up."""
    b = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    channels = width + width2
    own = channels // groups
    columns = tl.arange(0, WIDTH)
    inside = columns < own
    columns += group * own
    source += b * source_b
    if source2 is not None:
        source2 += b * source2_b
    share = 1.0 / (tl.cast(positions, tl.float64) * own)
    # Loaded with the statistics, and used behind them: memory is waited for once.
    scale = tl.load(weight + columns, mask=inside, other=0.0)
    shift = tl.load(bias + columns, mask=inside, other=0.0)
    if next_scale is not None:
        factor = tl.load(next_scale + columns, mask=inside, other=0.0)
    one = tl.arange(0, 1)
    origin = _mean(source, runs, width, source2, runs2, width2, one, one + group * own, one < 1)
    total = tl.zeros((RUNS, WIDTH), tl.float64)
    squares = tl.zeros((RUNS, WIDTH), tl.float64)
    low = tl.full((RUNS, WIDTH), float("inf"), tl.float32)
    high = tl.full((RUNS, WIDTH), float("-inf"), tl.float32)
    for first in range(0, RUNS if ONCE else tl.maximum(runs, runs2), RUNS):
        rows = first + tl.arange(0, RUNS)
        count = _counts(rows, columns, positions, run, runs, width, source2, run2, runs2)
        difference = _mean(source, runs, width, source2, runs2, width2, rows, columns, inside) - origin
        within = _plane(source, runs, width, source2, runs2, width2, rows, columns, inside, 2).to(tl.float64)
        valid = inside[None, :] & (count > 0)
        total += tl.where(valid, count * difference, 0.0)
        squares += tl.where(valid, within + count * difference * difference, 0.0)
        if ranges is not None:
            least = _plane(source, runs, width, source2, runs2, width2, rows, columns, inside, 3)
            most = _plane(source, runs, width, source2, runs2, width2, rows, columns, inside, 4)
            low = tl.where(valid, tl.minimum(low, least), low)
            high = tl.where(valid, tl.maximum(high, most), high)
    off = tl.sum(tl.sum(total, 0), 0) * share
    mean = tl.sum(tl.sum(origin, 0), 0) + off
    variance = tl.sum(tl.sum(squares, 0), 0) * share - off * off
    variance = tl.where(variance < float("inf"), variance, float("nan"))  # squares beyond float32
    exact_scale = scale.to(tl.float64) * (1.0 / tl.sqrt(variance + eps))
    shift = (shift.to(tl.float64) - mean * exact_scale).to(tl.float32)
    scale = exact_scale.to(tl.float32)
    tl.store(out + b * 2 * channels + columns, scale, mask=inside)
    tl.store(out + (b * 2 + 1) * channels + columns, shift, mask=inside)
    if ranges is not None:
        first_end, second_end = tl.min(low, 0) * scale + shift, tl.max(high, 0) * scale + shift
        least, most = tl.minimum(first_end, second_end), tl.maximum(first_end, second_end)
        if SILU:
            first_end, second_end = least / (1.0 + tl.exp(-least)), most / (1.0 + tl.exp(-most))
            spans_minimum = (least < SILU_ARGMIN) & (most > SILU_ARGMIN)
            least = tl.where(spans_minimum, SILU_MIN, tl.minimum(first_end, second_end))
            most = tl.maximum(first_end, second_end)
        if next_scale is not None:
            first_end, second_end = least * factor, most * factor
            least, most = tl.minimum(first_end, second_end), tl.maximum(first_end, second_end)
        # Minimum and maximum ignore NaN, so it is looked for. It is in every scale of the group or in none.
        bad = tl.max(tl.where(inside & ((scale != scale) | (shift != shift)), 1, 0), 0) > 0
        least = tl.min(tl.where(inside, least, float("inf")), 0)
        most = tl.max(tl.where(inside, most, float("-inf")), 0)
        place = ranges + b * 2 * groups + group
        tl.store(place, tl.where(bad, float("nan"), least))
        tl.store(place + groups, tl.where(bad, float("nan"), most))


def refuse(channels: int, groups: int) -> str | None:
    """Why these kernels cannot run the operator, or None if they can."""
    width = channels // groups
    return (
        f"a group has {width} channels; this takes at most {MAX_GROUP_CHANNELS}" if width > MAX_GROUP_CHANNELS else None
    )


def forward(
    sources: list[torch.Tensor],
    statistics: list[tuple[torch.Tensor, int] | None],
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    out: torch.Tensor,
    *,
    ranges: torch.Tensor | None = None,
    silu: bool = False,
    scale: torch.Tensor | None = None,
) -> None:
    """Fills out (B, 2, C) with scales and shifts, and ranges (B, 2, groups). See `vpd_fast.ops.group_norm_affine`.

    sources: one or two (B, P, C1), channels next to each other. statistics: of each, and the length of their runs, if
    they are known.
    """
    batch, positions, _ = sources[0].shape
    channels = weight.numel()
    # Four programs for each SM, of at least a few steps.
    programs = batch * triton.cdiv(channels, CHANNELS)
    runs = min(triton.cdiv(4 * multiprocessors(out.device), programs), triton.cdiv(positions, 4 * POSITIONS))
    run = triton.cdiv(triton.cdiv(positions, runs), POSITIONS) * POSITIONS
    arguments: dict[str, object] = {"source2": None, "source2_b": 0, "run2": 1, "runs2": 0, "width2": 0}
    most = 1
    for name, x, known in zip(("", "2"), sources, statistics, strict=False):
        if known is None:
            found = x.new_empty((batch, triton.cdiv(positions, run), PLANES.value, x.shape[2]), dtype=torch.float32)
            partial(x, run, found)
            known = found, run
        data, length = known
        arguments |= {f"source{name}": data, f"source{name}_b": data.stride(0), f"run{name}": length}
        arguments |= {f"runs{name}": data.shape[1], f"width{name}": x.shape[2]}
        most = max(most, data.shape[1])
    width = triton.next_power_of_2(channels // groups)
    merged = max(1, min(MAX_MERGED // width, triton.next_power_of_2(most)))
    launch(
        _merge_kernel,
        (batch * groups,),
        out,
        **arguments,
        **{"positions": positions, "weight": weight, "bias": bias, "out": out, "ranges": ranges, "eps": eps},
        **{"next_scale": scale, "groups": groups, "SILU": silu, "WIDTH": width},
        **{"RUNS": merged, "ONCE": merged >= most},
        num_warps=max(1, min(8, merged * width // MERGED_PER_WARP)),
    )
