"""What `linear` and `conv2d` do before the product: rows are joined, normalised, activated and rounded.

Integers of 8 bits are stored signed, u8 - 128 in the terms of `vpd_fast.ops.rounding`, because tensor cores take two
factors of one kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from vpd_fast.kernels import _prologue_cuda
from vpd_fast.kernels._common import UNFUSED, image_arguments, launch, rounded, rounding_arguments, to_int8

ELEMENTS = 4096  # of the rows of one program, if one row is not longer
MAX_FLOAT8_E4M3 = tl.constexpr(448.0)
PARTS = 1024  # ranges that are merged at a time


@triton.jit
def _load_source(x, offsets, valid, columns, channels):
    """The channels `columns` at the positions `offsets` as float32, zero outside."""
    inside = valid[:, None] & ((columns >= 0) & (columns < channels))[None, :]
    return tl.load(x + offsets[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _scale_and_zero(low, high, FLOAT8: tl.constexpr):
    """(scale, 1 / scale, zero) of a range, as `vpd_fast.ops.rounding` defines them.

    The scale of a range that is not finite is NaN, and its inverse 0. Divisions are exact: Triton's own are not, and
    a number in 10^4 would round the other way.
    """
    if FLOAT8:
        scale = tl.div_rn(tl.maximum(-low, high), MAX_FLOAT8_E4M3)
    else:
        scale = tl.div_rn(tl.maximum(high, 0.0) - tl.minimum(low, 0.0), 255.0)
    scale = tl.where((low != low) | (scale == float("inf")), float("nan"), scale)
    scale = tl.where(scale < 1.1754943508222875e-38, 0.0, scale)  # the smallest normal number
    inverse = tl.where(scale > 0.0, tl.div_rn(1.0, scale), 0.0)
    if FLOAT8:
        zero = tl.zeros_like(scale)
    else:
        zero = tl.floor(tl.maximum(-low, 0.0) * inverse + 0.5)
        zero = tl.where(inverse > 0.0, zero, 0.0)
    return scale, inverse, zero


@triton.jit
def _eight_bits(number, dtype: tl.constexpr):
    """Numbers divided by their scale, plus zero, rounded to nearest, ties to even, and integers made signed."""
    number = tl.where(tl.abs(number) < float("inf"), number, 0.0)  # the scale makes NaN of such a row
    if dtype == tl.int8:
        number = (number + 12582912.0) - 12582912.0  # 1.5 * 2^23
        return (tl.minimum(tl.maximum(number, 0.0), 255.0) - 128.0).to(tl.int8)
    return rounded(tl.minimum(tl.maximum(number, -MAX_FLOAT8_E4M3), MAX_FLOAT8_E4M3), dtype)


@triton.jit
def _range_of_image(ranges, parts, PARTS: tl.constexpr):
    """Least and largest number of an image whose parts have those at ranges (2, parts); the least may be NaN."""
    low = tl.zeros((PARTS,), tl.float32)
    high = tl.zeros((PARTS,), tl.float32)
    bad = tl.zeros((PARTS,), tl.int32)
    for first in range(0, parts, PARTS):
        columns = first + tl.arange(0, PARTS)
        value = tl.load(ranges + columns, mask=columns < parts, other=0.0)
        bad |= (value != value).to(tl.int32)
        low = tl.minimum(low, value)
        high = tl.maximum(high, tl.load(ranges + parts + columns, mask=columns < parts, other=0.0))
    return tl.where(tl.max(bad, 0) > 0, float("nan"), tl.min(low, 0)), tl.max(high, 0)


# Compiled once for all numbers of parts and margins, and for sizes whether they are multiples of 16 or not.
@triton.jit(
    do_not_specialize=("top", "left", "parts"), do_not_specialize_on_alignment=("height", "width", "tall", "wide")
)
def _prologue_kernel(
    x, x_b, x_y, x_x, x2, x2_b, x2_y, x2_x, height, width, tall, wide, top, left, scale_shift, input_scale, eps,
    out, scales, zeros, ranges, parts, copy, c_b, c_y, c_x, copy_factors, copy_shifts, K1, K,
    NORM: tl.constexpr, SILU: tl.constexpr, ROUND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one image (axis 0: images x blocks of rows), which count its positions with the padding around it.

    ROUND: "" to the type of `out`; "row" to 8 bits, with scale and zero of each row; "image" to 8 bits, with scale and
    zero of the image, from the ranges of its parts, (B, 2, parts); "range" writes the range of the program to `ranges`.
    copy: int8, where x itself is stored, rounded by factors and shifts of its columns, or None.
    """
    blocks = tl.cdiv(tall * wide, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    m = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    rows = b * tall * wide + m
    y, x_ = m // wide - top, m % wide - left
    in_image = (y >= 0) & (y < height) & (x_ >= 0) & (x_ < width)
    valid = m < tall * wide
    columns = tl.arange(0, COLUMNS)
    a = _load_source(x + b * x_b, y * x_y + x_ * x_x, in_image, columns, K1)
    if copy is not None:
        in_copy = columns < K1
        number = a * tl.load(copy_factors + columns, mask=in_copy, other=0.0)[None, :]
        number = to_int8(number + tl.load(copy_shifts + columns, mask=in_copy, other=0.0)[None, :])
        places = copy + (b * c_b + y * c_y + x_ * c_x)[:, None] + columns[None, :]
        tl.store(places, number, mask=(in_image & valid)[:, None] & in_copy[None, :])
    if x2 is not None:
        a += _load_source(x2 + b * x2_b, y * x2_y + x_ * x2_x, in_image, columns - K1, K - K1)
    in_row = columns < K
    if NORM:
        mean = tl.sum(a, 1) / K
        difference = tl.where(in_row[None, :], a - mean[:, None], 0.0)
        variance = tl.sum(difference * difference, 1) / K
        a = difference * (1.0 / tl.sqrt(variance + eps))[:, None]
    if scale_shift is not None:
        places = scale_shift + b * 2 * K + columns
        factor = tl.load(places, mask=in_row, other=0.0)[None, :]
        a = tl.fma(a, factor, tl.load(places + K, mask=in_row, other=0.0)[None, :])
    if SILU:
        a = a / (1.0 + tl.exp(-a))
    if input_scale is not None:
        a *= tl.load(input_scale + columns, mask=in_row, other=0.0)[None, :]
    a = tl.where(in_image[:, None] & in_row[None, :], a, 0.0)
    inside = valid[:, None] & in_row[None, :]
    places = out + (rows * K)[:, None] + columns[None, :]
    if ROUND == "":
        tl.store(places, rounded(a, out.dtype.element_ty), mask=inside)
    elif ROUND == "image":
        low, high = _range_of_image(ranges + b * 2 * parts, parts, PARTS)
        s, inverse, zero = _scale_and_zero(low, high, out.dtype.element_ty != tl.int8)
        if tl.program_id(0) % blocks == 0:
            tl.store(scales + b, s)
            if zeros is not None:
                tl.store(zeros + b, zero - 128.0)
        tl.store(places, _eight_bits(a * inverse + zero, out.dtype.element_ty), mask=inside)
    else:
        # Minimum and maximum ignore NaN, so it is looked for.
        low = tl.where(tl.max((a != a).to(tl.int32), 1) > 0, float("nan"), tl.min(a, 1))
        high = tl.max(a, 1)
        if ROUND == "range":
            bad = tl.max((low != low).to(tl.int32), 0) > 0
            place = ranges + b * 2 * blocks + tl.program_id(0) % blocks
            tl.store(place, tl.where(bad, float("nan"), tl.min(low, 0)))
            tl.store(place + blocks, tl.max(high, 0))
        else:
            s, inverse, zero = _scale_and_zero(low, high, out.dtype.element_ty != tl.int8)
            tl.store(scales + rows, s, mask=valid)
            if zeros is not None:
                tl.store(zeros + rows, zero - 128.0, mask=valid)
            number = a * inverse[:, None] + zero[:, None]
            tl.store(places, _eight_bits(number, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("parts",))
def _image_range_kernel(ranges, out, parts, PARTS: tl.constexpr):
    """The range (B, 2, 1) of each image (axis 0) from those of its parts (B, 2, parts)."""
    b = tl.program_id(0).to(tl.int64)
    low, high = _range_of_image(ranges + b * 2 * parts, parts, PARTS)
    tl.store(out + 2 * b, low)
    tl.store(out + 2 * b + 1, high)


@dataclass(frozen=True)
class Geometry:
    """How output positions read an image: (B, OH, OW) from (B, H, W). A matrix is an image of width 1."""

    out_height: int
    out_width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    top: int = 0
    left: int = 0

    def reads_outside(self, height: int, width: int) -> bool:
        """Whether some position reads beyond an image of this size."""
        last_y = (self.out_height - 1) * self.stride - self.top + self.kernel[0]
        last_x = (self.out_width - 1) * self.stride - self.left + self.kernel[1]
        return self.top > 0 or self.left > 0 or last_y > height or last_x > width


@dataclass(frozen=True)
class Rows:
    """The left factor of a product.

    a, a2: (B, H, W, C), (B, H, W, C2) of the weight's dtype, channels next to each other. scales, zeros: of 8 bits,
    (B * H * W,) or (B,): a ~ scale * (stored - zero). padding: zeros at top and left that `a` has already.
    """

    a: torch.Tensor
    a2: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    padding: tuple[int, int] = (0, 0)

    def without(self, top: int, left: int) -> "Rows":
        """All but the first rows and columns of each image."""
        a, a2 = (None if t is None else t[:, top:, left:] for t in (self.a, self.a2))
        return replace(self, a=a, a2=a2)


def prepare(
    x: torch.Tensor,
    x2: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    padding: Sequence[int] = (0, 0, 0, 0),
    norm: bool = False,
    eps: float = 0.0,
    scale_shift: torch.Tensor | None = None,
    silu: bool = False,
    input_scale: torch.Tensor | None = None,
    copy: tuple[torch.Tensor, torch.Tensor] | None = None,
    per_image: bool = False,
    ranges: torch.Tensor | None = None,
    backend: str = "triton",
) -> Rows:
    """Rows of that dtype with their padding, or what is given where nothing is to be done.

    x, x2: (B, H, W, C), channels next to each other. padding: top, left, bottom, right. per_image: one scale and zero
    for each image instead of each row, from `ranges` (B, 2, parts) if they are known, which takes half the time.
    copy: with a norm, by Triton, factors and shifts (2, k) of the columns of x and where x is stored, rounded by them.
    backend: "triton", or "cuda" for what `_prologue_cuda.refuse` takes. Others: as in `vpd_fast.ops.linear` and
    `conv2d`.
    """
    plain = not norm and scale_shift is None and not silu and input_scale is None
    if plain and all(t is None or t.dtype == dtype for t in (x, x2)):
        return Rows(x, x2)
    batch, height, width, k1 = x.shape
    k = k1 + (0 if x2 is None else x2.shape[3])
    top, left, bottom, right = padding
    tall, wide = height + top + bottom, width + left + right
    out = torch.empty(batch, tall, wide, k, dtype=dtype, device=x.device)
    scales = zeros = None
    if dtype.itemsize == 1:
        scales = x.new_empty(batch if per_image else batch * tall * wide, dtype=torch.float32)
        zeros = torch.empty_like(scales) if dtype == torch.int8 else None
    if backend == "cuda":
        how: dict[str, Any] = {"norm": norm, "eps": eps, "silu": silu, "per_image": per_image, "ranges": ranges}
        vectors = {"scale_shift": scale_shift, "input_scale": input_scale}
        _prologue_cuda.fill(x, x2, out, scales, zeros, padding=padding, **how, **vectors)
        return Rows(out, None, scales, zeros, (top, left))
    columns = triton.next_power_of_2(k)
    rows = max(1, ELEMENTS // columns)
    blocks = triton.cdiv(tall * wide, rows)
    arguments: dict[str, Any] = {
        **image_arguments("x", x),
        **image_arguments("x2", x2),
        **{"height": height, "width": width, "tall": tall, "wide": wide, "top": top, "left": left},
        **{"scale_shift": scale_shift, "input_scale": input_scale, "eps": eps},
        **image_arguments("copy", None if copy is None else copy[1], "c"),
        **rounding_arguments(None if copy is None else copy[0], "copy"),
        **{"K1": k1, "K": k, "NORM": norm, "SILU": silu},
        **{"ROWS": rows, "COLUMNS": columns, "num_warps": 4 if rows * columns <= ELEMENTS else 8, **UNFUSED},
    }

    def launch_rounding(rounding: str, ranges: torch.Tensor | None = None) -> None:
        parts = 1 if ranges is None else ranges.shape[2]
        at_once = min(PARTS, triton.next_power_of_2(parts)) if rounding == "image" else 1
        several = {"ranges": ranges, "parts": parts, "PARTS": at_once}
        launch(
            _prologue_kernel,
            (batch * blocks,),
            x,
            **{**arguments, **several, "out": out, "scales": scales, "zeros": zeros, "ROUND": rounding},
        )

    if scales is None or not per_image:
        launch_rounding("" if scales is None else "row")
        return Rows(out, None, scales, zeros, (top, left))
    if ranges is None:
        parts = x.new_empty((batch, 2, blocks), dtype=torch.float32)
        launch_rounding("range", parts)
        ranges = x.new_empty((batch, 2, 1), dtype=torch.float32)
        launch(_image_range_kernel, (batch,), x, ranges=parts, out=ranges, parts=blocks, PARTS=PARTS)
    launch_rounding("image", ranges)
    return Rows(out, None, scales, zeros, (top, left))
