"""Statistics of GroupNorm as a scale and a shift per channel, in two kernels.

`_partial_kernel` reads the activations, the second time from the cache: each program finds mean and sum of squared
deviations of a run of positions for a block of channels. `_merge_kernel`, a program per image and group, puts those of
the group's channels together in float64 (Chan, Golub, LeVeque, 1979). Partial results are per channel, so a group may
have channels of both sources, and the order of all sums is fixed: no atomics.
"""

import torch
import triton
import triton.language as tl
from vpd_fast.kernels._common import launch, multiprocessors

CHANNELS = 64  # of a program: 128 bytes of bfloat16
POSITIONS = 32  # at a time
MERGED = 2048  # partial results at a time


@triton.jit
def _partial_kernel(
    x, x_b, x_p, means, rests, deviations, positions, run, first_channel, channels, all_channels,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Axis 0: images x runs of positions, axis 1: blocks of channels of one source.

    means, rests, deviations: (B, runs, all channels) float32; the mean is the sum of the first two.
    """
    runs = tl.cdiv(positions, run)
    b = (tl.program_id(0) // runs).to(tl.int64)
    start = (tl.program_id(0) % runs).to(tl.int64) * run
    stop = tl.minimum(start + run, positions)
    columns = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = columns < channels
    x += b * x_b
    count = (stop - start).to(tl.float32)
    origin = tl.load(x + start * x_p + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    for first in range(start, stop, POSITIONS):
        rows = first + tl.arange(0, POSITIONS)
        valid = (rows < stop)[:, None] & inside[None, :]
        values = tl.load(x + rows[:, None] * x_p + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        total += tl.where(valid, values - origin[None, :], 0.0)
    mean = origin + tl.sum(total, 0) / count
    # Again, now from the cache: squares of anything but deviations would lose digits to cancellation.
    total = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    squares = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    for first in range(start, stop, POSITIONS):
        rows = first + tl.arange(0, POSITIONS)
        valid = (rows < stop)[:, None] & inside[None, :]
        values = tl.load(x + rows[:, None] * x_p + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        difference = tl.where(valid, values - mean[None, :], 0.0)
        total += difference
        squares += difference * difference
    rest = tl.sum(total, 0) / count  # what the mean was off
    place = (tl.program_id(0).to(tl.int64) * all_channels) + first_channel + columns
    tl.store(means + place, mean, mask=inside)
    tl.store(rests + place, rest, mask=inside)
    tl.store(deviations + place, tl.sum(squares, 0) - count * rest * rest, mask=inside)


@triton.jit
def _merge_kernel(
    means, rests, deviations, weight, bias, out, positions, run, channels, groups, eps,
    RUNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Axis 0: images x groups. RUNS: runs at a time; WIDTH: channels of a group, rounded up."""
    runs = tl.cdiv(positions, run)
    b = (tl.program_id(0) // groups).to(tl.int64)
    width = channels // groups
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    columns += (tl.program_id(0) % groups) * width
    start = b * runs * channels
    total = tl.zeros((RUNS, WIDTH), tl.float64)
    for first in range(0, runs, RUNS):
        rows = first + tl.arange(0, RUNS)
        valid = (rows < runs)[:, None] & inside[None, :]
        count = tl.cast(tl.minimum(positions - rows * run, run), tl.float64)[:, None]
        place = start + rows[:, None] * channels + columns[None, :]
        value = tl.load(means + place, mask=valid, other=0.0).to(tl.float64)
        value += tl.load(rests + place, mask=valid, other=0.0).to(tl.float64)
        total += tl.where(valid, value * count, 0.0)
    numbers = tl.cast(positions, tl.float64) * width
    mean = tl.sum(tl.sum(total, 1), 0) / numbers
    total = tl.zeros((RUNS, WIDTH), tl.float64)
    for first in range(0, runs, RUNS):
        rows = first + tl.arange(0, RUNS)
        valid = (rows < runs)[:, None] & inside[None, :]
        count = tl.cast(tl.minimum(positions - rows * run, run), tl.float64)[:, None]
        place = start + rows[:, None] * channels + columns[None, :]
        difference = tl.load(means + place, mask=valid, other=0.0).to(tl.float64) - mean
        difference += tl.load(rests + place, mask=valid, other=0.0).to(tl.float64)
        within = tl.load(deviations + place, mask=valid, other=0.0).to(tl.float64)
        total += tl.where(valid, within + count * difference * difference, 0.0)
    variance = tl.sum(tl.sum(total, 1), 0) / numbers
    variance = tl.where(variance < float("inf"), variance, float("nan"))  # squares beyond float32
    inverse = 1.0 / tl.sqrt(variance + eps)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float64) * inverse
    shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float64) - mean * scale
    tl.store(out + b * 2 * channels + columns, scale.to(tl.float32), mask=inside)
    tl.store(out + (b * 2 + 1) * channels + columns, shift.to(tl.float32), mask=inside)


def forward(
    sources: list[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    out: torch.Tensor,
) -> None:
    """Fills out (B, 2, C) with scales and shifts. sources: one or two (B, P, C1), channels next to each other."""
    first = sources[0]
    batch, positions, _ = first.shape
    channels = weight.numel()
    # Four programs for each multiprocessor, of at least a few steps.
    programs = batch * triton.cdiv(channels, CHANNELS)
    runs = min(triton.cdiv(4 * multiprocessors(first.device), programs), triton.cdiv(positions, 4 * POSITIONS))
    run = triton.cdiv(triton.cdiv(positions, runs), POSITIONS) * POSITIONS
    runs = triton.cdiv(positions, run)
    means, rests, deviations = first.new_empty((3, batch, runs, channels), dtype=torch.float32)
    partial = {"means": means, "rests": rests, "deviations": deviations, "positions": positions, "run": run}
    begin = 0
    for x in sources:
        own = x.shape[2]
        launch(
            _partial_kernel,
            (batch * runs, triton.cdiv(own, CHANNELS)),
            x,
            **{"x": x, "x_b": x.stride(0), "x_p": x.stride(1)},
            **partial,
            **{"first_channel": begin, "channels": own, "all_channels": channels},
            **{"POSITIONS": POSITIONS, "CHANNELS": CHANNELS, "num_warps": 4},
        )
        begin += own
    width = triton.next_power_of_2(channels // groups)
    launch(
        _merge_kernel,
        (batch * groups,),
        first,
        **partial,
        **{"weight": weight, "bias": bias, "out": out, "channels": channels, "groups": groups, "eps": eps},
        **{"RUNS": max(1, min(MERGED // width, triton.next_power_of_2(runs))), "WIDTH": width, "num_warps": 4},
    )
