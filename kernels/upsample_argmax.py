"""`upsample_argmax` and `upsample_argmax_windows`: one pass over the logits, of which only labels are written.

A program has a tile of output pixels and walks the channels, keeping the largest value and its channel. The logits that
a pixel reads are those of its neighbours, too, so nearly all loads come from the first-level cache, and the resized
logits exist one channel at a time, in registers. Every channel is resized by the same operations, `tl.fma` in the order
of the CUDA C++ kernel, so that of equal channels the first wins.
"""

import torch
import triton
import triton.language as tl

from vpd_fast.kernels._common import INTERPRETED, UNFUSED, launch

UNROLLED_TAPS = (2, 4, 8)  # taps of an axis that a kernel is compiled for; more are counted when it runs
TILE = (8, 32)  # rows and columns of a program's tile
INTERPRETED_TILE = (128, 256)  # the most; the interpreter's time is by operations, and by thousands of pixels


@triton.jit
def _tap(offsets, weights, places, t, inside):
    """One tap of each pixel along an axis: offset and weight."""
    offset = tl.load(offsets + places + t, mask=inside, other=0)
    return offset, tl.load(weights + places + t, mask=inside, other=0.0)


@triton.jit
def _column(points, ys, y_weights, row_offsets, row_weights, row_places, in_rows, inside, taps, TAPS: tl.constexpr):
    """The weighted sum over the rows' taps of what lies at `points` (ROWS, COLUMNS)."""
    total = tl.zeros(inside.shape, tl.float32)
    if TAPS > 0:
        for t in tl.static_range(TAPS):
            point = tl.load(points + ys[t][:, None], mask=inside, other=0.0).to(tl.float32)
            total = tl.fma(y_weights[t][:, None], point, total)
    else:
        for tap in range(taps):
            y, weight = _tap(row_offsets, row_weights, row_places, tap, in_rows)
            point = tl.load(points + y[:, None], mask=inside, other=0.0).to(tl.float32)
            total = tl.fma(weight[:, None], point, total)
    return total


@triton.jit(do_not_specialize=("channels", "taps"))
def _upsample_argmax_kernel(
    logits, stride_batch, stride_channel, row_offsets, row_weights, column_offsets, column_weights, labels,
    channels, height, width, taps,
    TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Labels (B, height, width) of one tile of pixels (axis 0: images x tiles of rows x tiles of columns).

    TAPS: how many there are, or 0 for `taps` of them. UNROLL: channels side by side.
    """
    across = tl.cdiv(width, COLUMNS)
    tiles = tl.cdiv(height, ROWS) * across
    image = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    rows = (tile // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (tile % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = rows < height, columns < width
    inside = in_rows[:, None] & in_columns[None, :]
    row_places, column_places = rows * taps, columns * taps
    ys = ()
    y_weights = ()
    for t in tl.static_range(TAPS):
        y, y_weight = _tap(row_offsets, row_weights, row_places, t, in_rows)
        ys = ys + (y,)
        y_weights = y_weights + (y_weight,)
    xs = ()
    x_weights = ()
    if TAPS <= 4:  # eight of both axes would not fit the registers
        for t in tl.static_range(TAPS):
            x, x_weight = _tap(column_offsets, column_weights, column_places, t, in_columns)
            xs = xs + (x,)
            x_weights = x_weights + (x_weight,)
    logits += image * stride_batch
    best = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    label = tl.zeros((ROWS, COLUMNS), tl.int32)
    for first in range(0, channels, UNROLL):
        for c in tl.static_range(UNROLL):
            # Beyond the last channel it is that one again, which is not better than itself.
            number = tl.minimum(first + c, channels - 1)
            channel = logits + tl.cast(number, tl.int64) * stride_channel
            value = tl.zeros((ROWS, COLUMNS), tl.float32)
            if TAPS > 0 and TAPS <= 4:
                for t in tl.static_range(TAPS):
                    column = _column(
                        channel + xs[t][None, :], ys, y_weights,
                        row_offsets, row_weights, row_places, in_rows, inside, taps, TAPS,
                    )  # fmt: skip
                    value = tl.fma(x_weights[t][None, :], column, value)
            else:
                for tap in range(taps):
                    x, x_weight = _tap(column_offsets, column_weights, column_places, tap, in_columns)
                    column = _column(
                        channel + x[None, :], ys, y_weights,
                        row_offsets, row_weights, row_places, in_rows, inside, taps, TAPS,
                    )  # fmt: skip
                    value = tl.fma(x_weight[None, :], column, value)
            # The first NaN wins, then the first of the largest values.
            better = (value > best) | ((value != value) & (best == best))
            best = tl.where(better, value, best)
            label = tl.where(better, number, label)
    places = labels + (image * height + rows)[:, None] * width + columns[None, :]
    tl.store(places, label.to(tl.int64), mask=inside)


def taps_for(max_taps: int) -> int:
    """Taps per pixel and axis of the tables of `forward`, for an axis whose pixels have up to `max_taps`."""
    return next((taps for taps in UNROLLED_TAPS if taps >= max_taps), max_taps)


def tile_for(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a program's tile for labels of that size."""
    if not INTERPRETED.value:
        return TILE
    return tuple(
        min(most, triton.next_power_of_2(n)) for most, n in zip(INTERPRETED_TILE, (height, width), strict=True)
    )


def forward(
    logits: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor],
    columns: tuple[torch.Tensor, torch.Tensor],
    labels: torch.Tensor,
    *,
    tile: tuple[int, int] | None = None,
) -> None:
    """Fills labels (B, H, W) int64, contiguous.

    logits: (B, grid_y, grid_x, C, h, w) float32, bfloat16 or float16, any strides.
    rows, columns: for each tap of a row or column of pixels the offset int64 of what it reads, within an image, and its
        weight float32, which is not zero; (H or W, taps) contiguous, with as many taps as `taps_for` says.
    """
    batch, channels = logits.shape[0], logits.shape[3]
    _, height, width = labels.shape
    tile = tile or tile_for(height, width)
    taps = rows[0].shape[1]
    unrolled = taps if taps in UNROLLED_TAPS else 0
    launch(
        _upsample_argmax_kernel,
        (batch * triton.cdiv(height, tile[0]) * triton.cdiv(width, tile[1]),),
        logits,
        **{"logits": logits, "stride_batch": logits.stride(0), "stride_channel": logits.stride(3)},
        **{"row_offsets": rows[0], "row_weights": rows[1]},
        **{"column_offsets": columns[0], "column_weights": columns[1]},
        **{"labels": labels, "channels": channels, "height": height, "width": width, "taps": taps},
        # Four channels of two taps each are sixteen loads on their way at a time.
        **{"TAPS": unrolled, "UNROLL": 4 if unrolled == 2 else 1},
        **{"ROWS": tile[0], "COLUMNS": tile[1], "num_warps": 8, **UNFUSED},
    )
