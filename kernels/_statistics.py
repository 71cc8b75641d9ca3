"""Mean, M2, minimum and maximum of each channel in runs of positions: what group norm is made of.

They are found by the gemm that makes an activation, while its tile is in registers, or by `partial`, which reads the
activation. Memory: (B, runs, PLANES, channels) float32: mean, its rounding error, M2 (sum of squared deviations),
minimum, maximum.
"""

import torch
import triton
import triton.language as tl

from vpd_fast.kernels._common import launch

PLANES = tl.constexpr(5)
CHANNELS = 64  # of a program: 128 bytes of bfloat16
POSITIONS = 32  # at a time


@triton.jit
def store_planes(out, inside, channels, mean, rest, deviations, low, high):
    """out: where the means go, the other planes behind them."""
    tl.store(out, mean, mask=inside)
    tl.store(out + channels, rest, mask=inside)
    tl.store(out + 2 * channels, deviations, mask=inside)
    tl.store(out + 3 * channels, low, mask=inside)
    tl.store(out + 4 * channels, high, mask=inside)


@triton.jit
def _difference(x, x_p, origin, first, stop, columns, inside, POSITIONS: tl.constexpr):
    """Numbers of some positions less those of `origin`, zero outside, and the numbers with NaN outside."""
    rows = first + tl.arange(0, POSITIONS)
    valid = (rows < stop)[:, None] & inside[None, :]
    values = tl.load(x + rows[:, None] * x_p + columns[None, :], mask=valid, other=float("nan")).to(tl.float32)
    return tl.where(valid, values - origin[None, :], 0.0), values


@triton.jit(do_not_specialize=("positions", "run"))
def _partial_kernel(
    x, x_b, x_p, out, out_b, positions, run, channels, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Axis 0: images x runs of positions, axis 1: blocks of channels."""
    runs = tl.cdiv(positions, run)
    b = (tl.program_id(0) // runs).to(tl.int64)
    start = (tl.program_id(0) % runs).to(tl.int64) * run
    stop = tl.minimum(start + run, positions)
    columns = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = columns < channels
    x += b * x_b
    count = (stop - start).to(tl.float32)
    mean = tl.load(x + start * x_p + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    for first in range(start, stop, POSITIONS):
        total += _difference(x, x_p, mean, first, stop, columns, inside, POSITIONS)[0]
    mean += tl.sum(total, 0) / count
    # Again, now from the cache: squares of anything but deviations would lose digits to cancellation.
    total = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    squares = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    low = tl.full((POSITIONS, CHANNELS), float("inf"), tl.float32)
    high = tl.full((POSITIONS, CHANNELS), float("-inf"), tl.float32)
    for first in range(start, stop, POSITIONS):
        difference, values = _difference(x, x_p, mean, first, stop, columns, inside, POSITIONS)
        total += difference
        squares += difference * difference
        low = tl.minimum(low, values)  # which ignores NaN
        high = tl.maximum(high, values)
    rest = tl.sum(total, 0) / count  # what the mean was off
    deviations = tl.sum(squares, 0) - count * rest * rest
    place = out + b * out_b + (tl.program_id(0) % runs).to(tl.int64) * PLANES * channels + columns
    store_planes(place, inside, channels, mean, rest, deviations, tl.min(low, 0), tl.max(high, 0))


def partial(x: torch.Tensor, run: int, out: torch.Tensor) -> None:
    """Fills out (B, runs, PLANES, C), contiguous but for its first stride. x: (B, P, C), its last stride 1."""
    batch, positions, channels = x.shape
    launch(
        _partial_kernel,
        (batch * out.shape[1], triton.cdiv(channels, CHANNELS)),
        x,
        **{"x": x, "x_b": x.stride(0), "x_p": x.stride(1), "out": out, "out_b": out.stride(0)},
        **{"positions": positions, "run": run, "channels": channels},
        **{"POSITIONS": POSITIONS, "CHANNELS": CHANNELS, "num_warps": 4},
    )
