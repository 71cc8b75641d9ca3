"""Helpers of the Triton kernels of attention, forward and backward: splitting, tiles, launching.

Triton's tiles have power-of-two sides. A side of 150 is covered by tiles of 128 and 32, one of 40 by 32 and 16: the
second tile is None where one is enough. A matrix product over a split side is the sum of two.

Written without `from __future__ import annotations`: Triton reads the annotations of kernels.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from vpd_fast.kernels._common import UNFUSED, dot, rounded, to_int8

LOG2_E = 1.4426950408889634


def split(size: int) -> tuple[int, int]:
    """The powers of two >= 16, the second possibly 0, with the smallest sum >= size: 150 -> (128, 32)."""
    powers = [1 << i for i in range(4, max(5, size.bit_length() + 1))]
    pairs = [(a, b) for a in powers for b in (0, *powers) if b <= a and a + b >= size]
    return min(pairs, key=lambda pair: (sum(pair), pair[1]))


def tile_config(dtype: torch.dtype, dim: int, tokens: int) -> dict[str, int]:
    """Rows and tokens of a tile of the forward kernels, chosen so that no register spills, and launch options."""
    options = {"num_warps": 4, "num_stages": 2}
    if dtype == torch.float32:  # no tensor cores: operands live in registers
        side = 32 if dim <= 128 else 16
        return {"ROWS": side, "L_BLOCK": side, **options}
    # Blocks of 64 tokens, or 32 where that leaves less of the last block empty.
    few = dim > 128 or -tokens % 64 != -tokens % 32
    return {"ROWS": 64, "L_BLOCK": 32 if few else 64, **options}


def batch_stride(x: torch.Tensor) -> int:
    """Stride of the images in elements, 0 if all share one."""
    return x.stride(0) if x.shape[0] > 1 else 0


def attention_arguments(q: torch.Tensor, k: torch.Tensor, heads: int, scale: float) -> dict[str, Any]:
    """Arguments that all kernels of attention take: tensors, strides and sizes of queries and keys.

    Unfused, because kernels that form a score again must form the same: of 10^7, half a unit more is 2^0.5 times as
    likely.
    """
    dim = q.shape[2] // heads
    d0, d1 = split(dim)
    return {
        **{"q": q, "q_b": q.stride(0), "q_n": q.stride(1)},
        **{"k": k, "k_b": batch_stride(k), "k_l": k.stride(1)},
        **{"N": q.shape[1], "L": k.shape[1], "heads": heads, "score_scale": scale * LOG2_E},
        **{"D": dim, "D0": d0, "D1": d1, **UNFUSED},
    }


def map_arguments(name: str, x: torch.Tensor | None) -> dict[str, Any]:
    """Arguments of a map (B, N, M) or (B, heads, N, M): the tensor, or None, and its strides."""
    strides = (0, 0, 0, 0) if x is None else x.stride() if x.dim() == 4 else (x.stride(0), 0, *x.stride()[1:])
    return {name: x, **{f"{name}_{axis}": stride for axis, stride in zip("bhnm", strides, strict=True)}}


@triton.jit
def tile_of_queries(N, ROWS: tl.constexpr):
    """A program's tile (axis 0: images x tiles): image, first query, queries counted from it, which of them exist."""
    tiles = tl.cdiv(N, ROWS)
    start = (tl.program_id(0) % tiles).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    return (tl.program_id(0) // tiles).to(tl.int64), start, rows, start + rows < N


@triton.jit
def load_rows(pointer, rows, stride, valid, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Rows of D elements as tiles (rows, D0) and (rows, D1); zero beyond D and where `valid` is false."""
    starts = pointer + rows[:, None] * stride
    columns = tl.arange(0, D0)
    x0 = tl.load(starts + columns[None, :], mask=valid[:, None] & (columns < D)[None, :], other=0.0)
    x1 = x0  # not used if D1 is 0; a compiled function cannot return None
    if D1 > 0:
        columns = D0 + tl.arange(0, D1)
        x1 = tl.load(starts + columns[None, :], mask=valid[:, None] & (columns < D)[None, :], other=0.0)
    return x0, x1


@triton.jit
def _rounded_part(x, columns, dtype: tl.constexpr, factors, shifts, D: tl.constexpr):
    """Columns of a head in the type of the memory; int8 by their factors and shifts, if there are any."""
    if factors is not None:
        in_head = columns < D
        x = x * tl.load(factors + columns, mask=in_head, other=0.0)[None, :]
        return to_int8(x + tl.load(shifts + columns, mask=in_head, other=0.0)[None, :])
    return rounded(x, dtype)


@triton.jit
def store_rows(
    pointer, rows, stride, valid, x0, x1, factor, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    factors=None, shifts=None,
):  # fmt: skip
    """Writes factor * x where load_rows would read it, rounded to the type of the memory.

    factors, shifts: of the head's columns, by which numbers become int8.
    """
    starts = pointer + rows[:, None] * stride
    columns = tl.arange(0, D0)
    x0 = _rounded_part(x0 * factor, columns, pointer.dtype.element_ty, factors, shifts, D)
    tl.store(starts + columns[None, :], x0, mask=valid[:, None] & (columns < D)[None, :])
    if D1 > 0:
        columns = D0 + tl.arange(0, D1)
        x1 = _rounded_part(x1 * factor, columns, pointer.dtype.element_ty, factors, shifts, D)
        tl.store(starts + columns[None, :], x1, mask=valid[:, None] & (columns < D)[None, :])


@triton.jit
def dot_transposed(a0, a1, b0, b1, D1: tl.constexpr):
    """a b^T of two split matrices (m, D), (n, D), in float32."""
    x = dot(a0, tl.trans(b0), None)
    if D1 > 0:
        x = dot(a1, tl.trans(b1), x)
    return x


@triton.jit
def masked_scores(q0, q1, k0, k1, score_scale, valid, D1: tl.constexpr):
    """score_scale * q k^T, rounded, minus infinity for the tokens that are not valid."""
    return tl.where(valid[None, :], dot_transposed(q0, q1, k0, k1, D1) * score_scale, float("-inf"))


@triton.jit
def add_dot(x0, x1, a, b0, b1, D1: tl.constexpr):
    """x + a b, with b (n, D) and x (m, D) split; a is rounded to the type of b."""
    a = rounded(a, b0.dtype)
    x0 = dot(a, b0, x0)
    if D1 > 0:
        x1 = dot(a, b1, x1)
    return x0, x1


@triton.jit
def zero_rows(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """A split float32 matrix (ROWS, D) of zeros."""
    x0 = tl.zeros((ROWS, D0), tl.float32)
    x1 = x0  # not used if D1 is 0
    if D1 > 0:
        x1 = tl.zeros((ROWS, D1), tl.float32)
    return x0, x1
