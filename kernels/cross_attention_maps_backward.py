"""Backward of cross_attention_maps: gradients of q, k and v, from those of the output and of the maps.

With t the gradient of a token's column of the mean map, per head: dP = dO v^T + t; dS = P (dP - delta), where delta is
the row sum of P dP; dq = scale dS k; dk = scale dS^T q; dv = P^T dO. delta is formed from P, since the usual row sum of
dO O misses the maps.

Nothing is kept from the forward pass. `_query_kernel` reads the tokens twice: once for each row's highest score, sum
and delta, which it also stores, once for dq. `_token_kernel` computes dk and dv of a block of tokens over a chunk of
rows; where all images share one text, chunks span images. `_reduce_kernel` adds the chunks in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from vpd_fast.kernels._attention import (
    add_dot,
    attention_arguments,
    batch_stride,
    dot_transposed,
    load_rows,
    map_arguments,
    masked_scores,
    store_rows,
    tile_of_queries,
    zero_rows,
)
from vpd_fast.kernels._common import launch, multiprocessors, rounded
from vpd_fast.kernels.cross_attention_maps import MAX_ROW_STRIDE
from vpd_fast.kernels.cross_attention_maps import refuse as refuse_forward

REDUCE_BLOCK = 1024
MAX_TEXTS = 65535  # an axis of a CUDA grid


def _tile_configs(dtype: torch.dtype, dim: int) -> tuple[dict[str, int], dict[str, int]]:
    """Of `_query_kernel` and `_token_kernel`: rows and tokens of a tile, chosen so that no register spills."""
    run = {"num_warps": 4, "num_stages": 2}
    if dtype == torch.float32:  # no tensor cores: operands live in registers
        tile = {"ROWS": 16, "L_BLOCK": 16, **run}
        return tile, tile
    return {"ROWS": 64, "L_BLOCK": 32, **run}, {"ROWS": 32 if dim <= 64 else 16, "L_BLOCK": 64, **run}


@triton.jit
def _map_gradient(grad_maps, grad_maps_n, grad_maps_m, ids, weights, factor, rows, valid, tokens, L):
    """What the maps add to the gradients of the probabilities, factor * weights * grad_maps.

    rows, valid (n, 1) and tokens (1, m), or transposed.
    """
    columns = tokens
    if ids is not None:
        columns = tl.load(ids + tokens, mask=tokens < L, other=-1)
        factor *= tl.load(weights + columns, mask=columns >= 0, other=0.0)
    inside = valid & (tokens < L) & (columns >= 0)
    return factor * tl.load(grad_maps + rows * grad_maps_n + columns.to(tl.int64) * grad_maps_m, mask=inside, other=0.0)


@triton.jit
def _scores_and_gradients(
    q0, q1, g0, g1, k0, k1, v, v_l, grad_maps, grad_maps_n, grad_maps_m, ids, weights, factor,
    rows, valid, tokens, L, score_scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr, L_BLOCK: tl.constexpr,
):  # fmt: skip
    """(rows, tokens): scores, and gradients of the probabilities. g0 is None without gradient of the output."""
    scores = masked_scores(q0, q1, k0, k1, score_scale, tokens < L, D1)
    dp = tl.zeros((ROWS, L_BLOCK), tl.float32)
    if g0 is not None:
        v0, v1 = load_rows(v, tokens, v_l, tokens < L, D, D0, D1)
        dp += dot_transposed(g0, g1, v0, v1, D1)
    if grad_maps is not None:
        dp += _map_gradient(
            grad_maps, grad_maps_n, grad_maps_m, ids, weights, factor, rows[:, None], valid[:, None], tokens[None, :], L
        )
    return scores, dp


@triton.jit
def _query_kernel(
    q, q_b, q_n, k, k_b, k_l, v, v_b, v_l, grad_out, grad_out_b, grad_out_n,
    grad_maps, grad_maps_b, grad_maps_h, grad_maps_n, grad_maps_m, ids, weights,
    dq, highest_out, inverse_out, delta_out, N, L, heads, score_scale, scale, factor,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr, L_BLOCK: tl.constexpr,
):  # fmt: skip
    """dq of one tile of rows (axis 0: images x tiles) for one head (axis 1).

    highest_out, inverse_out, delta_out: (B, heads, N) float32, each row's highest score, inverse of its sum, and delta.
    """
    b, start, rows, valid = tile_of_queries(N, ROWS)
    h = tl.program_id(1)
    k += b * k_b + h * D
    v += b * v_b + h * D
    q0, q1 = load_rows(q + b * q_b + start * q_n + h * D, rows, q_n, valid, D, D0, D1)
    g0 = None
    g1 = None
    if grad_out is not None:
        grad_out += b * grad_out_b + start * grad_out_n + h * D
        g0, g1 = load_rows(grad_out, rows, grad_out_n, valid, D, D0, D1)
    if grad_maps is not None:
        grad_maps += b * grad_maps_b + h.to(tl.int64) * grad_maps_h + start * grad_maps_n
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    delta = tl.zeros((ROWS,), tl.float32)
    for first in range(0, L, L_BLOCK):
        tokens = first + tl.arange(0, L_BLOCK)
        k0, k1 = load_rows(k, tokens, k_l, tokens < L, D, D0, D1)
        scores, dp = _scores_and_gradients(
            q0, q1, g0, g1, k0, k1, v, v_l, grad_maps, grad_maps_n, grad_maps_m, ids, weights, factor,
            rows, valid, tokens, L, score_scale, D, D0, D1, ROWS, L_BLOCK,
        )  # fmt: skip
        higher = tl.maximum(highest, tl.max(scores, 1))
        keep = tl.exp2(highest - higher)
        p = tl.exp2(scores - higher[:, None])
        total = total * keep + tl.sum(p, 1)
        delta = delta * keep + tl.sum(p * dp, 1)
        highest = higher
    inverse = 1.0 / total
    delta *= inverse
    dq0, dq1 = zero_rows(ROWS, D0, D1)
    for first in range(0, L, L_BLOCK):
        tokens = first + tl.arange(0, L_BLOCK)
        k0, k1 = load_rows(k, tokens, k_l, tokens < L, D, D0, D1)
        scores, dp = _scores_and_gradients(
            q0, q1, g0, g1, k0, k1, v, v_l, grad_maps, grad_maps_n, grad_maps_m, ids, weights, factor,
            rows, valid, tokens, L, score_scale, D, D0, D1, ROWS, L_BLOCK,
        )  # fmt: skip
        p = tl.exp2(scores - highest[:, None]) * inverse[:, None]
        dq0, dq1 = add_dot(dq0, dq1, p * (dp - delta[:, None]), k0, k1, D1)
    store_rows(dq + (b * N + start) * heads * D + h * D, rows, heads * D, valid, dq0, dq1, scale, D, D0, D1)
    place = (b * heads + h) * N + start + rows
    tl.store(highest_out + place, highest, mask=valid)
    tl.store(inverse_out + place, inverse, mask=valid)
    tl.store(delta_out + place, delta, mask=valid)


@triton.jit
def _token_kernel(
    q, q_b, q_n, k, k_b, k_l, v, v_b, v_l, grad_out, grad_out_b, grad_out_n,
    grad_maps, grad_maps_b, grad_maps_h, grad_maps_n, grad_maps_m, ids, weights,
    partials, highest_in, inverse_in, delta_in, N, L, heads, texts, images_per_text, tiles_per_chunk,
    score_scale, factor,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr, L_BLOCK: tl.constexpr,
    GRAD_K: tl.constexpr, GRAD_V: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv of one block of tokens and head (axis 0), from one chunk of rows (axis 1) of one text (axis 2).

    GRAD_K, GRAD_V: compute and store only one of them, where the registers do not suffice for both.
    A text's rows are those of its images, in tiles. partials: (2, chunks, texts, L, heads * D) float32.
    """
    blocks = tl.cdiv(L, L_BLOCK)
    h = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * L_BLOCK
    chunk = tl.program_id(1)
    text = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, ROWS)
    tokens = first + tl.arange(0, L_BLOCK)
    k0, k1 = load_rows(k + text * k_b + h * D, tokens, k_l, tokens < L, D, D0, D1)
    if GRAD_K and grad_out is not None:
        v0, v1 = load_rows(v + text * v_b + h * D, tokens, v_l, tokens < L, D, D0, D1)
    dk0, dk1 = zero_rows(L_BLOCK, D0, D1)
    dv0, dv1 = zero_rows(L_BLOCK, D0, D1)
    tiles = tl.cdiv(N, ROWS)
    for tile in range(chunk * tiles_per_chunk, min((chunk + 1) * tiles_per_chunk, tiles * images_per_text)):
        b = text * images_per_text + tile // tiles
        start = tl.cast(tile % tiles, tl.int64) * ROWS
        valid = start + rows < N
        q0, q1 = load_rows(q + b * q_b + start * q_n + h * D, rows, q_n, valid, D, D0, D1)
        place = (b * heads + h) * N + start + rows
        highest = tl.load(highest_in + place, mask=valid, other=0.0)
        inverse = tl.load(inverse_in + place, mask=valid, other=0.0)
        # Tokens beyond the last have rows of zeros in k, and nothing reads what is computed for them.
        scores = masked_scores(k0, k1, q0, q1, score_scale, valid, D1)
        p = tl.exp2(scores - highest[None, :]) * inverse[None, :]
        dp = tl.zeros((L_BLOCK, ROWS), tl.float32)
        if grad_out is not None:
            g = grad_out + b * grad_out_b + start * grad_out_n + h * D
            g0, g1 = load_rows(g, rows, grad_out_n, valid, D, D0, D1)
            if GRAD_K:
                dp += dot_transposed(v0, v1, g0, g1, D1)
            if GRAD_V:
                dv0, dv1 = add_dot(dv0, dv1, p, g0, g1, D1)
        if GRAD_K:
            if grad_maps is not None:
                own = grad_maps + b * grad_maps_b + h.to(tl.int64) * grad_maps_h + start * grad_maps_n
                dp += _map_gradient(
                    own, grad_maps_n, grad_maps_m,
                    ids, weights, factor, rows[None, :], valid[None, :], tokens[:, None], L,
                )  # fmt: skip
            delta = tl.load(delta_in + place, mask=valid, other=0.0)
            dk0, dk1 = add_dot(dk0, dk1, p * (dp - delta[None, :]), q0, q1, D1)
    size = tl.cast(texts, tl.int64) * L * heads * D
    partials += chunk.to(tl.int64) * size + (text * L + first) * heads * D + h * D
    tokens -= first
    inside = first + tokens < L
    if GRAD_K:
        store_rows(partials, tokens, heads * D, inside, dk0, dk1, 1.0, D, D0, D1)
    if GRAD_V:
        partials += tl.num_programs(1).to(tl.int64) * size
        store_rows(partials, tokens, heads * D, inside, dv0, dv1, 1.0, D, D0, D1)


@triton.jit
def _reduce_kernel(partials, dk, dv, scale, size, chunks, BLOCK: tl.constexpr):
    """dk = scale * sum over chunks, dv = sum over chunks; partials: (2, chunks, size) float32."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sum_k = tl.zeros((BLOCK,), tl.float32)
    sum_v = tl.zeros((BLOCK,), tl.float32)
    partials_v = partials + tl.cast(chunks, tl.int64) * size
    for _ in range(chunks):
        sum_k += tl.load(partials + place, mask=place < size, other=0.0)
        sum_v += tl.load(partials_v + place, mask=place < size, other=0.0)
        partials += size
        partials_v += size
    tl.store(dk + place, rounded(sum_k * scale, dk.dtype.element_ty), mask=place < size)
    tl.store(dv + place, rounded(sum_v, dv.dtype.element_ty), mask=place < size)


def refuse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> str | None:
    """Why these kernels cannot run the operator (arguments as for `backward`), or None if they can."""
    if k.shape[0] > MAX_TEXTS:
        return f"there are {k.shape[0]} texts; this takes at most {MAX_TEXTS}"
    return refuse_forward(q, k, v, heads)


def backward(
    grad_out: torch.Tensor | None,
    grad_maps: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    *,
    heads: int,
    scale: float,
    weight: float,
    categories: Any,
    average_heads: bool,
    chunks: int | None = None,
) -> None:
    """Fills dq (B, N, heads * D), dk and dv (B or 1, L, heads * D), contiguous and of the inputs' dtype.

    grad_out: (B, N, heads * D) of the inputs' dtype, last stride 1, or None. grad_maps: float32 of the shape of maps,
    any strides, or None. The rest as in `cross_attention_maps.forward`.
    chunks: into how many parts the rows of a text are divided for dk and dv. None chooses.
    """
    if grad_out is None and grad_maps is None:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    # Within a tile rows are counted with 32 bits.
    if grad_out is not None and grad_out.stride(1) >= MAX_ROW_STRIDE:
        grad_out = grad_out.contiguous()
    if grad_maps is not None and grad_maps.stride(-2) >= MAX_ROW_STRIDE:
        grad_maps = grad_maps.contiguous()
    batch, rows, _ = q.shape
    texts, tokens, width = k.shape
    gradients = {
        **{"v": v, "v_b": batch_stride(v), "v_l": v.stride(1), "grad_out": grad_out},
        **{f"grad_out_{axis}": 0 if grad_out is None else grad_out.stride(i) for i, axis in enumerate("bn")},
        **map_arguments("grad_maps", grad_maps),
        "ids": None if categories is None or grad_maps is None else categories.ids,
        "weights": None if categories is None or grad_maps is None else categories.weights,
        "factor": weight / heads if average_heads else weight,
        **attention_arguments(q, k, heads, scale),
    }
    highest, inverse, delta = q.new_empty((3, batch, heads, rows), dtype=torch.float32)
    query_config, token_config = _tile_configs(q.dtype, width // heads)
    launch(
        _query_kernel,
        (batch * triton.cdiv(rows, query_config["ROWS"]), heads),
        q,
        **gradients,
        **{"dq": dq, "highest_out": highest, "inverse_out": inverse, "delta_out": delta, "scale": scale},
        **query_config,
    )
    programs = heads * triton.cdiv(tokens, token_config["L_BLOCK"])
    tiles = triton.cdiv(rows, token_config["ROWS"]) * (batch // texts)
    if chunks is None:
        chunks = max(1, 2 * multiprocessors(q.device) // (programs * texts))
    tiles_per_chunk = triton.cdiv(tiles, chunks)
    chunks = triton.cdiv(tiles, tiles_per_chunk)
    partials = q.new_empty((2, chunks, texts, tokens, width), dtype=torch.float32)
    # Wider heads would spill with both gradients in registers.
    for grad_k, grad_v in ((True, True),) if width // heads < 128 else ((True, False), (False, True)):
        launch(
            _token_kernel,
            (programs, chunks, texts),
            q,
            **gradients,
            **{"partials": partials, "highest_in": highest, "inverse_in": inverse, "delta_in": delta},
            **{"texts": texts, "images_per_text": batch // texts, "tiles_per_chunk": tiles_per_chunk},
            **{"GRAD_K": grad_k, "GRAD_V": grad_v},
            **token_config,
        )
    launch(
        _reduce_kernel,
        (triton.cdiv(dk.numel(), REDUCE_BLOCK),),
        q,
        **{"partials": partials, "dk": dk, "dv": dv, "scale": scale, "size": dk.numel(), "chunks": chunks},
        BLOCK=REDUCE_BLOCK,
    )
