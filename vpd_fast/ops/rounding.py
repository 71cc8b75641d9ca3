"""Rounding of activations to 8 bits: row by row, as `linear` and `conv2d` do it, or column by column, as results.

Rows. int8: with low = min(row, 0) and high = max(row, 0), scale = (high - low) / 255,
zero = floor(-low / scale + 1/2) and u8 = round(x / scale + zero), so that x ~ scale * (u8 - zero) and 0 is exact. The
products are summed exactly:

    sum_k x[k] * w[n, k] ~ scale * scales[n] * (sum_k u8[k] * data[n, k] - zero * weight_sums[n])

float8_e4m3fn: scale = max |row| / 448 and f8 = row / scale, rounded to nearest, ties to even; the products are
summed in float32. In both, a row with an infinity or a NaN gives NaN throughout, and one whose scale would be below the
smallest normal float32 is zero.

Columns. Whoever makes a result may round it to int8 on the way, by a factor and a shift of each column that are known
before (a `rounding`, (2, N) float32): stored = round(x * rounding[0] + rounding[1]), to nearest, ties to even, and
within -128 ... 127. A product reads such numbers as they are: what they stand for is in its weight and its bias. They
cannot hold what is not finite: infinities are the outermost numbers, and NaN is -128.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vpd_fast.ops._checks import check_tensor
from vpd_fast.ops.packing import FLOAT8, MAX_8_BITS

LEVELS = 255  # steps between the least and the largest 8-bit number
LEAST, MOST = -128, 127
Range = tuple[Tensor, Tensor]  # least and largest numbers, (..., 1)


def range_of_rows(a: Tensor, ranges: Tensor | None = None) -> Range:
    """Minimum and maximum of each row of (B, ..., k); with `ranges` (B, 2, parts) those of the row's image."""
    if ranges is None:
        return a.amin(-1, keepdim=True), a.amax(-1, keepdim=True)
    shape = (-1, *[1] * (a.dim() - 1))
    return ranges[:, 0].amin(1).view(shape), ranges[:, 1].amax(1).view(shape)


def quantize_rows(a: Tensor, known_range: Range | None = None) -> tuple[Tensor, Tensor]:
    """Rows (..., k) float32 rounded to 8 bits: whole numbers u8 - zero as float32, and the scales (..., 1)."""
    low, high = known_range or range_of_rows(a)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / LEVELS
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, scale)
    inverse = torch.where((scale > 0) & scale.isfinite(), 1 / scale, 0.0)
    zero = torch.where(inverse > 0, torch.floor(-low * inverse + 0.5), 0.0)
    finite = a.where(a.isfinite(), 0.0)  # of rows that are not, the scale makes NaN of everything
    u8 = (finite * inverse + zero).round_().clamp_(0, LEVELS)
    return u8 - zero, torch.where(scale.isfinite(), scale, torch.nan)


def round_rows_to_float8(a: Tensor, known_range: Range | None = None) -> tuple[Tensor, Tensor]:
    """Rows (..., k) float32 rounded to float8_e4m3fn: the numbers f8 as float32, and the scales (..., 1)."""
    limit, (low, high) = MAX_8_BITS[FLOAT8], known_range or range_of_rows(a)
    scale = torch.maximum(-low, high) / limit
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, scale)
    inverse = torch.where((scale > 0) & scale.isfinite(), 1 / scale, 0.0)
    finite = a.where(a.isfinite(), 0.0)
    f8 = (finite * inverse).clamp_(-limit, limit).to(FLOAT8)
    return f8.float(), torch.where(scale.isfinite(), scale, torch.nan)


def rounded_rows(a: Tensor, dtype: torch.dtype, known_range: Range | None = None) -> tuple[Tensor, Tensor]:
    """Rows (..., k) float32 rounded to that 8-bit type, less their zeros, as float32, and the scales (..., 1)."""
    return (round_rows_to_float8 if dtype == FLOAT8 else quantize_rows)(a, known_range)


def round_columns(x: Tensor, rounding: Tensor) -> Tensor:
    """Numbers (..., N) as int8, by a factor and a shift of each column, (2, N) float32."""
    factor, shift = rounding.unbind(0)
    return torch.nan_to_num(x.float() * factor + shift, nan=LEAST).clamp_(LEAST, MOST).round_().to(torch.int8)


def put(out: Tensor, x: Tensor, rounding: Tensor | None) -> None:
    """Stores x in out, with a rounding as int8."""
    out.copy_(x if rounding is None else round_columns(x, rounding))


def check_rounding(name: str, rounding: Tensor | None, columns: int) -> None:
    """Raises InputError unless it is None or a factor and a shift of so many columns."""
    if rounding is not None:
        check_tensor(name, rounding, "2 N", (torch.float32,), "", **{"2": 2, "N": columns})
