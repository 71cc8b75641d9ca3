"""Cross-attention that also returns its probabilities, averaged over heads and summed into categories: forward.

Two schedules:

- One pass, for few tokens and enough rows to fill the GPU: a program computes a tile of rows for all heads. Whole rows
  of scores stay in registers, and so does the map, which is written once.
- Two passes, for everything else: `_online_kernel`, a program per head, computes the output and each row's highest
  score and sum (as FlashAttention does); `_map_kernel` recomputes the probabilities for a tile of the map, looping over
  heads. With categories, a program reads only the tokens of its block of categories, so none is computed twice. This
  has no scratch memory beyond two numbers per row and head, and enough programs even for one small image.

Exponentials are base 2: scores carry a factor log2(e). Everything between load and store is float32. The highest score
and the sum are kept apart instead of as one logarithm: with large scores that would cost the map its accuracy.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from vpd_fast.kernels._attention import (
    add_dot,
    attention_arguments,
    batch_stride,
    load_rows,
    map_arguments,
    masked_scores,
    split,
    store_rows,
    tile_config,
    tile_of_queries,
    zero_rows,
)
from vpd_fast.kernels._common import dot, launch, multiprocessors, rounded, rounding_arguments
from vpd_fast.kernels._limits import OFFSETS, row_stride

MAX_HEAD_DIM = 256
MAX_TOKENS = 1 << 20  # blocks of 32 of them are an axis of a grid, of which CUDA has 65535
MAX_ROW_STRIDE = 2**25  # 64 rows so far apart are 2**31 elements
ONE_PASS_WIDTH = 128  # tokens + head dimension, both rounded up as `split` does: more does not fit the registers
ONE_PASS_ROWS = 16  # elements, of which distances of rows are multiples


@triton.jit
def _store_map(maps, maps_n, maps_m, addend, addend_n, addend_m, x, factor, rows, valid, columns, M):
    """maps = addend + factor * x for the given rows and columns."""
    inside = valid[:, None] & (columns < M)[None, :]
    rows = rows.to(tl.int64)[:, None]
    columns = columns.to(tl.int64)[None, :]
    x *= factor
    if addend is not None:
        x += tl.load(addend + rows * addend_n + columns * addend_m, mask=inside, other=0.0)
    tl.store(maps + rows * maps_n + columns * maps_m, rounded(x, maps.dtype.element_ty), mask=inside)


@triton.jit
def _add_categories(sums, x, token_categories, categories):
    """Adds the columns of x (rows, tokens) to those of sums (rows, categories): a product with zeros and ones.

    x is taken apart into three bfloat16 numbers, which have all its bits, so tensor cores lose nothing.
    """
    members = rounded((token_categories[:, None] == categories[None, :]).to(tl.float32), tl.bfloat16)
    for _ in tl.static_range(3):
        part = rounded(x, tl.bfloat16)
        sums = dot(part, members, sums)
        x -= part.to(tl.float32)
    return sums


@triton.jit(do_not_specialize=("L",))
def _one_pass_kernel(
    q, q_b, q_n, k, k_b, k_l, v, v_b, v_l, out,
    maps, maps_b, maps_h, maps_n, maps_m, addend, addend_b, addend_h, addend_n, addend_m,
    ids, weights, round_factors, round_shifts, N, L, M, heads, heads_per_program, score_scale, factor,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, L0: tl.constexpr, L1: tl.constexpr,
    ROWS: tl.constexpr, C_BLOCK: tl.constexpr,
):  # fmt: skip
    """Output and map of one tile of rows (axis 0: images x tiles), for one group of heads (axis 1).

    C_BLOCK: categories at a time, 0 without categories.
    """
    b, start, rows, valid = tile_of_queries(N, ROWS)
    first_head = tl.program_id(1) * heads_per_program
    tokens0 = tl.arange(0, L0)
    acc0 = tl.zeros((ROWS, L0), tl.float32)
    if L1 > 0:
        tokens1 = L0 + tl.arange(0, L1)
        acc1 = tl.zeros((ROWS, L1), tl.float32)
    q += b * q_b + start * q_n
    k += b * k_b
    v += b * v_b
    out += (b * N + start) * heads * D
    for h in range(first_head, first_head + heads_per_program):
        q0, q1 = load_rows(q + h * D, rows, q_n, valid, D, D0, D1)
        k0, k1 = load_rows(k + h * D, tokens0, k_l, tokens0 < L, D, D0, D1)
        scores0 = masked_scores(q0, q1, k0, k1, score_scale, tokens0 < L, D1)
        highest = tl.max(scores0, 1)
        if L1 > 0:
            k0, k1 = load_rows(k + h * D, tokens1, k_l, tokens1 < L, D, D0, D1)
            scores1 = masked_scores(q0, q1, k0, k1, score_scale, tokens1 < L, D1)
            highest = tl.maximum(highest, tl.max(scores1, 1))
        p0 = tl.exp2(scores0 - highest[:, None])
        total = tl.sum(p0, 1)
        if L1 > 0:
            p1 = tl.exp2(scores1 - highest[:, None])
            total += tl.sum(p1, 1)
        inverse = (1.0 / total)[:, None]
        acc0 += p0 * inverse
        v0, v1 = load_rows(v + h * D, tokens0, v_l, tokens0 < L, D, D0, D1)
        o0, o1 = zero_rows(ROWS, D0, D1)
        o0, o1 = add_dot(o0, o1, p0, v0, v1, D1)
        if L1 > 0:
            acc1 += p1 * inverse
            v0, v1 = load_rows(v + h * D, tokens1, v_l, tokens1 < L, D, D0, D1)
            o0, o1 = add_dot(o0, o1, p1, v0, v1, D1)
        factors, shifts = round_factors, round_shifts
        if round_factors is not None:
            factors, shifts = round_factors + h * D, round_shifts + h * D
        store_rows(out + h * D, rows, heads * D, valid, o0, o1, inverse, D, D0, D1, factors, shifts)
    maps += b * maps_b + tl.program_id(1).to(tl.int64) * maps_h + start * maps_n
    if addend is not None:
        addend += b * addend_b + tl.program_id(1).to(tl.int64) * addend_h + start * addend_n
    if C_BLOCK == 0:
        _store_map(maps, maps_n, maps_m, addend, addend_n, addend_m, acc0, factor, rows, valid, tokens0, M)
        if L1 > 0:
            _store_map(maps, maps_n, maps_m, addend, addend_n, addend_m, acc1, factor, rows, valid, tokens1, M)
    else:
        ids0 = tl.load(ids + tokens0, mask=tokens0 < L, other=-1)
        if L1 > 0:
            ids1 = tl.load(ids + tokens1, mask=tokens1 < L, other=-1)
        for first in range(0, M, C_BLOCK):
            columns = first + tl.arange(0, C_BLOCK)
            sums = tl.zeros((ROWS, C_BLOCK), tl.float32)
            sums = _add_categories(sums, acc0, ids0, columns)
            if L1 > 0:
                sums = _add_categories(sums, acc1, ids1, columns)
            sums *= tl.load(weights + columns, mask=columns < M, other=0.0)[None, :]
            _store_map(maps, maps_n, maps_m, addend, addend_n, addend_m, sums, factor, rows, valid, columns, M)


@triton.jit(do_not_specialize=("L",))
def _online_kernel(
    q, q_b, q_n, k, k_b, k_l, v, v_b, v_l, out, highest_out, inverse_out, round_factors, round_shifts,
    N, L, heads, score_scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ROWS: tl.constexpr, L_BLOCK: tl.constexpr,
):  # fmt: skip
    """Output of one tile of rows (axis 0: images x tiles) for one head (axis 1).

    highest_out, inverse_out: (B, heads, N) float32, each row's highest score and the inverse of its sum, or None.
    """
    b, start, rows, valid = tile_of_queries(N, ROWS)
    h = tl.program_id(1)
    k += b * k_b + h * D
    v += b * v_b + h * D
    q0, q1 = load_rows(q + b * q_b + start * q_n + h * D, rows, q_n, valid, D, D0, D1)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    o0, o1 = zero_rows(ROWS, D0, D1)
    for first in range(0, L, L_BLOCK):
        tokens = first + tl.arange(0, L_BLOCK)
        k0, k1 = load_rows(k, tokens, k_l, tokens < L, D, D0, D1)
        scores = masked_scores(q0, q1, k0, k1, score_scale, tokens < L, D1)
        higher = tl.maximum(highest, tl.max(scores, 1))
        keep = tl.exp2(highest - higher)
        p = tl.exp2(scores - higher[:, None])
        total = total * keep + tl.sum(p, 1)
        highest = higher
        o0 *= keep[:, None]
        if D1 > 0:
            o1 *= keep[:, None]
        v0, v1 = load_rows(v, tokens, v_l, tokens < L, D, D0, D1)
        o0, o1 = add_dot(o0, o1, p, v0, v1, D1)
    inverse = 1.0 / total
    out += (b * N + start) * heads * D + h * D
    if round_factors is not None:
        round_factors += h * D
        round_shifts += h * D
    store_rows(
        out, rows, heads * D, valid, o0, o1, inverse[:, None], D, D0, D1, round_factors, round_shifts
    )  # fmt: skip
    if highest_out is not None:
        place = (b * heads + h) * N + start + rows
        tl.store(highest_out + place, highest, mask=valid)
        tl.store(inverse_out + place, inverse, mask=valid)


@triton.jit
def _sum_probabilities(
    q, q_n, k, k_l, highest_in, inverse_in, rows, valid, tokens, L, N, first_head, heads, score_scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr, L_BLOCK: tl.constexpr,
):  # fmt: skip
    """The probabilities (rows, tokens) of `heads` heads, summed; zero for tokens >= L."""
    acc = tl.zeros((ROWS, L_BLOCK), tl.float32)
    for h in range(first_head, first_head + heads):
        q0, q1 = load_rows(q + h * D, rows, q_n, valid, D, D0, D1)
        k0, k1 = load_rows(k + h * D, tokens, k_l, tokens < L, D, D0, D1)
        highest = tl.load(highest_in + h * N + rows, mask=valid, other=0.0)
        inverse = tl.load(inverse_in + h * N + rows, mask=valid, other=0.0)
        scores = masked_scores(q0, q1, k0, k1, score_scale, tokens < L, D1)
        acc += tl.exp2(scores - highest[:, None]) * inverse[:, None]
    return acc


@triton.jit(do_not_specialize=("L",))
def _map_kernel(
    q, q_b, q_n, k, k_b, k_l, highest_in, inverse_in,
    maps, maps_b, maps_h, maps_n, maps_m, addend, addend_b, addend_h, addend_n, addend_m,
    ids, weights, tokens, offsets, N, L, M, heads, heads_per_program, score_scale, factor,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ROWS: tl.constexpr, L_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of the map: rows (axis 0: images x tiles), tokens or categories (axis 1), group of heads (axis 2)."""
    b, start, rows, valid = tile_of_queries(N, ROWS)
    first_head = tl.program_id(2) * heads_per_program
    q += b * q_b + start * q_n
    k += b * k_b
    highest_in += b * heads * N + start
    inverse_in += b * heads * N + start
    if C_BLOCK == 0:
        columns = tl.program_id(1) * L_BLOCK + tl.arange(0, L_BLOCK)
        sums = _sum_probabilities(
            q, q_n, k, k_l, highest_in, inverse_in, rows, valid, columns, L, N, first_head, heads_per_program,
            score_scale, D, D0, D1, ROWS, L_BLOCK,
        )  # fmt: skip
    else:
        columns = tl.program_id(1) * C_BLOCK + tl.arange(0, C_BLOCK)
        sums = tl.zeros((ROWS, C_BLOCK), tl.float32)
        stop = tl.load(offsets + min((tl.program_id(1) + 1) * C_BLOCK, M))
        for first in range(tl.load(offsets + tl.program_id(1) * C_BLOCK), stop, L_BLOCK):
            place = first + tl.arange(0, L_BLOCK)
            members = tl.load(tokens + place, mask=place < stop, other=0)
            acc = _sum_probabilities(
                q, q_n, k, k_l, highest_in, inverse_in, rows, valid, members, L, N, first_head, heads_per_program,
                score_scale, D, D0, D1, ROWS, L_BLOCK,
            )  # fmt: skip
            categories = tl.load(ids + members, mask=place < stop, other=-1)
            sums = _add_categories(sums, acc, categories, columns)
        sums *= tl.load(weights + columns, mask=columns < M, other=0.0)[None, :]
    maps += b * maps_b + tl.program_id(2).to(tl.int64) * maps_h + start * maps_n
    if addend is not None:
        addend += b * addend_b + tl.program_id(2).to(tl.int64) * addend_h + start * addend_n
    _store_map(maps, maps_n, maps_m, addend, addend_n, addend_m, sums, factor, rows, valid, columns, M)


def _category_block(categories: Any) -> int:
    return 0 if categories is None else min(32, max(16, triton.next_power_of_2(categories.count)))


def refuse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> str | None:
    """Why these kernels cannot run the operator (arguments as for `forward`), or None if they can."""
    if q.shape[2] // heads > MAX_HEAD_DIM:
        return f"a head has {q.shape[2] // heads} channels; this takes at most {MAX_HEAD_DIM}"
    if k.shape[1] * max(row_stride(k), row_stride(v)) >= OFFSETS:
        return "k or v of one image spans more than 2**31 elements"
    if k.shape[1] > MAX_TOKENS:
        return f"there are {k.shape[1]} tokens; this takes at most {MAX_TOKENS}"
    if max(row_stride(q), q.shape[2]) >= MAX_ROW_STRIDE:
        return "rows of q are more than 2**25 elements apart"
    if heads * q.shape[1] >= OFFSETS:
        return "heads and rows of one image are more than 2**31"
    return None


def one_pass_refuses(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> str | None:
    """Why the schedule of one pass cannot run the operator, so that two passes do, or None if it can."""
    if q.dtype == torch.float32:
        return "q is float32, whose operands would not fit the registers"
    width = sum(split(k.shape[1])) + sum(split(q.shape[2] // heads))
    if width > ONE_PASS_WIDTH:
        return f"tokens and head dimension are {width} columns together; one pass takes at most {ONE_PASS_WIDTH}"
    # Compiled for distances of 120, which are loaded one by one, it once gave wrong results on an H200, for a reason
    # that neither the interpreter nor its PTX shows.
    distances = (row_stride(q), row_stride(k), row_stride(v), q.shape[2])
    if any(distance % ONE_PASS_ROWS for distance in distances):
        return (
            f"rows are {max(d for d in distances if d % ONE_PASS_ROWS)} elements apart, no multiple of {ONE_PASS_ROWS}"
        )
    return None


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    maps: torch.Tensor | None,
    addend: torch.Tensor | None,
    *,
    heads: int,
    scale: float,
    weight: float,
    categories: Any,
    average_heads: bool,
    rounding: torch.Tensor | None = None,
    one_pass: bool | None = None,
) -> None:
    """Fills `out`, and `maps` with addend + weight * probabilities, averaged over heads or per head.

    q: (B, N, heads * D); k, v: (B or 1, L, heads * D), all float32, bfloat16 or float16, last stride 1.
    out: (B, N, heads * D), contiguous.
    maps: (B, N, M) or, if not average_heads, (B, heads, N, M), any strides, or None.
    addend: None, or float32 of the shape of maps; may be the same memory.
    categories: None (M = L), or ids (L,) int32, weights (M,) float32, tokens (n,) int32, offsets (M + 1,) int32 and
        count = M: category c sums the columns tokens[offsets[c]:offsets[c + 1]] and multiplies them by weights[c].
    rounding: (2, heads * D) float32, rows contiguous, by which the output becomes int8, or None.
    one_pass: chooses the schedule, where `one_pass_refuses` leaves a choice. None: by the number of rows.
    """
    batch, rows, _ = q.shape
    attention = attention_arguments(q, k, heads, scale)
    values = {"v": v, "v_b": batch_stride(v), "v_l": v.stride(1), "out": out, **rounding_arguments(rounding)}
    config = tile_config(q.dtype, attention["D"], k.shape[1])
    tiles = batch * triton.cdiv(rows, config["ROWS"])
    if maps is None:
        launch(_online_kernel, (tiles, heads), q, **attention, **values, highest_out=None, inverse_out=None, **config)
        return
    groups = 1 if average_heads else heads
    mapping = {
        **map_arguments("maps", maps),
        **map_arguments("addend", addend),
        "ids": None if categories is None else categories.ids,
        "weights": None if categories is None else categories.weights,
        "M": maps.shape[-1],
        "heads_per_program": heads // groups,
        "factor": weight / (heads // groups),
        "C_BLOCK": _category_block(categories),
    }
    if one_pass is None:
        # Two passes do about twice the work, but on all multiprocessors.
        one_pass = tiles * groups >= multiprocessors(q.device) // 2
    if one_pass and one_pass_refuses(q, k, v, heads) is None:
        l0, l1 = split(k.shape[1])
        del config["L_BLOCK"]
        launch(_one_pass_kernel, (tiles, groups), q, **attention, **values, **mapping, L0=l0, L1=l1, **config)
        return
    highest, inverse = q.new_empty((2, batch, heads, rows), dtype=torch.float32)
    launch(_online_kernel, (tiles, heads), q, **attention, **values, highest_out=highest, inverse_out=inverse, **config)
    mapping["tokens"], mapping["offsets"] = (
        (None, None) if categories is None else (categories.tokens, categories.offsets)
    )
    blocks = triton.cdiv(mapping["M"], mapping["C_BLOCK"] or config["L_BLOCK"])
    launch(
        _map_kernel,
        (tiles, blocks, groups),
        q,
        **attention,
        highest_in=highest,
        inverse_in=inverse,
        **mapping,
        **config,
    )
