"""Self-attention with heads wider than the registers hold: the KL encoder's one head of 512 channels.

Two matrix products with the probabilities between them in memory, few enough to stay in the second-level cache. As
FlashAttention, with tiles of 64 queries (whose sums alone are 128 registers per thread), 4096 positions would be 64
programs for 132 SMs, which read 0.5 GB of keys and values from that cache; here 1024 and then 128 programs
read 0.5 GB of operands and write 34 MB of probabilities, and all SMs have work.

The probabilities of a tile are relative to the tile's highest score of each row, so the scores never leave float32, no
kernel comes between the products, and a probability is rounded once. The second product multiplies what a tile adds by
how far that score is below the row's highest. Queries are taken in chunks, so memory does not grow with their number.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from vpd_fast.kernels._attention import LOG2_E, batch_stride
from vpd_fast.kernels._common import dot, launch, multiprocessors, rounded
from vpd_fast.kernels._limits import row_stride

# Probabilities in memory at a time: 64 MiB of 16 bits, two images of 64 x 64 positions, so that a launch has twice the
# programs of one image. The second-level caches of A100 and H200, of 40 and 50 MB, still hold most of them.
MAX_PROBABILITIES = 1 << 25
MAX_KEYS = 1 << 23  # a row of probabilities must fit, rounded up to a tile


CHUNKS = ("first_head", "first_row", "rows_end")  # kernels are compiled once for all values of these


@triton.jit(do_not_specialize=CHUNKS)
def _probabilities_kernel(
    q, q_b, q_n, k, k_b, k_l, probabilities, highest_out, total_out,
    first_head, first_row, rows_end, chunk, tokens, heads, score_scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile: exp2(scores - highest of the row in this tile), highest and sum (axis 0: heads of images x tiles).

    probabilities: (heads of images, chunk, tokens rounded up to BN); beyond the last token they are zero.
    highest_out, total_out: (heads of images, tiles of tokens, chunk) float32.
    """
    down, across = tl.cdiv(chunk, BM), tl.cdiv(tokens, BN)
    place = (tl.program_id(0) // (down * across)).to(tl.int64)
    b, h = (place + first_head) // heads, (place + first_head) % heads
    within = tl.program_id(0) % (down * across)
    tile, start = (within // down).to(tl.int64), (within % down).to(tl.int64) * BM
    rows, columns = tl.arange(0, BM), tl.arange(0, BN)
    in_chunk = start + rows < chunk
    valid = in_chunk & (first_row + start + rows < rows_end)
    real = tile * BN + columns < tokens
    q_rows = q + (b * q_b + h * D + (first_row + start) * q_n) + (rows * q_n)[:, None]
    k_rows = k + (b * k_b + h * D + tile * BN * k_l) + (columns * k_l)[:, None]
    scores = tl.zeros((BM, BN), tl.float32)
    for first in range(0, D, BK):
        c = first + tl.arange(0, BK)
        left = tl.load(q_rows + c[None, :], mask=valid[:, None] & (c < D)[None, :], other=0.0)
        right = tl.load(k_rows + c[None, :], mask=real[:, None] & (c < D)[None, :], other=0.0)
        scores = dot(left, tl.trans(right), scores)
    scores = tl.where(real[None, :], scores * score_scale, float("-inf"))
    highest = tl.max(scores, 1)
    p = rounded(tl.exp2(scores - highest[:, None]), probabilities.dtype.element_ty)
    probabilities += ((place * chunk + start) * across + tile) * BN
    tl.store(probabilities + (rows * (across * BN))[:, None] + columns[None, :], p, mask=in_chunk[:, None])
    statistics = (place * across + tile) * chunk + start
    tl.store(highest_out + statistics + rows, highest, mask=in_chunk)
    tl.store(total_out + statistics + rows, tl.sum(p.to(tl.float32), 1), mask=in_chunk)


@triton.jit(do_not_specialize=CHUNKS)
def _output_kernel(
    probabilities, highest_in, total_in, v, v_b, v_l, out, out_b, out_n,
    first_head, first_row, rows_end, chunk, tokens, heads,
    D: tl.constexpr, KEYS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of the output (axis 0: heads of images x tiles). KEYS: tokens of a tile of the probabilities."""
    down = tl.cdiv(chunk, BM)
    across: tl.constexpr = (D + BN - 1) // BN
    tiles = tl.cdiv(tokens, KEYS)
    place = (tl.program_id(0) // (down * across)).to(tl.int64)
    b, h = (place + first_head) // heads, (place + first_head) % heads
    within = tl.program_id(0) % (down * across)
    start = (within // across).to(tl.int64) * BM
    rows = tl.arange(0, BM)
    columns = within % across * BN + tl.arange(0, BN)
    valid = (start + rows < chunk) & (first_row + start + rows < rows_end)
    in_head = (columns < D)[None, :]
    highest_in += place * tiles * chunk + start
    total_in += place * tiles * chunk + start
    highest = tl.full((BM,), float("-inf"), tl.float32)
    for tile in range(tiles):
        here = tl.load(highest_in + tl.cast(tile, tl.int64) * chunk + rows, mask=valid, other=0.0)
        highest = tl.maximum(highest, here)
    total = tl.zeros((BM,), tl.float32)
    for tile in range(tiles):
        offset = tl.cast(tile, tl.int64) * chunk
        here = tl.load(highest_in + offset + rows, mask=valid, other=0.0)
        total += tl.load(total_in + offset + rows, mask=valid, other=1.0) * tl.exp2(here - highest)
    p_rows = probabilities + (place * chunk + start) * tiles * KEYS + (rows * (tiles * KEYS))[:, None]
    v += b * v_b + h * D
    keys = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, tiles * KEYS, BK):
        p = tl.load(p_rows + (first + keys)[None, :], mask=valid[:, None], other=0.0)
        places = v + tl.cast(first, tl.int64) * v_l + (keys * v_l)[:, None] + columns[None, :]
        values = tl.load(places, mask=(first + keys < tokens)[:, None] & in_head, other=0.0)
        here = tl.load(highest_in + tl.cast(first // KEYS, tl.int64) * chunk + rows, mask=valid, other=0.0)
        acc += dot(p, values, None) * tl.exp2(here - highest)[:, None]
    acc *= (1.0 / total)[:, None]
    out += b * out_b + h * D + (first_row + start) * out_n
    places = out + (rows * out_n)[:, None] + columns[None, :]
    tl.store(places, rounded(acc, out.dtype.element_ty), mask=valid[:, None] & in_head)


def tile_config(dtype: torch.dtype, tiles: int, processors: int) -> dict[str, int]:
    """Tile of a product that has that many tiles of 128 x 128 numbers, and how to run it; no register spills."""
    if dtype == torch.float32:  # no tensor cores
        return {"BM": 64, "BN": 64, "BK": 16, "num_warps": 8, "num_stages": 2}
    if 4 * tiles >= 3 * processors:
        return {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}
    return {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3}


def refuse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why these kernels cannot run the operator, or None if they can."""
    if k.shape[1] > MAX_KEYS:
        return f"there are {k.shape[1]} keys; this takes at max_probabilities {MAX_KEYS}"
    if max(q.shape[2], *(row_stride(x) for x in (q, k, v))) >= 2**24:
        return "rows of q, k or v are more than 2**24 elements apart"  # 128 of which are a tile
    return None


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    *,
    heads: int,
    scale: float,
    max_probabilities: int = MAX_PROBABILITIES,
) -> None:
    """Fills out (B, N, heads * D) with the attention of q (B, N, heads * D) to k and v (B or 1, M, heads * D).

    All float32, bfloat16 or float16, of one dtype, last stride 1. max_probabilities: how many may be in memory at
    a time, at least those of one row, M rounded up to 128.
    """
    batch, length, width = q.shape
    tokens, dim = k.shape[1], width // heads
    processors = multiprocessors(q.device)
    places = batch * heads  # rows of one head of one image each
    blocks = triton.cdiv(length, 128) * places
    first = tile_config(q.dtype, blocks * triton.cdiv(tokens, 128), processors)
    second = tile_config(q.dtype, blocks * triton.cdiv(dim, 128), processors)
    tiles = triton.cdiv(tokens, first["BN"])
    row = tiles * first["BN"]
    chunk = min(length, max(1, max_probabilities // row))
    if chunk < length and chunk > first["BM"]:
        chunk -= chunk % first["BM"]
    at_once = min(places, max(1, max_probabilities // (chunk * row))) if chunk == length else 1
    probabilities = q.new_empty((at_once, chunk, row))
    highest, total = q.new_empty((2, at_once, tiles, chunk), dtype=torch.float32)
    shared: dict[str, Any] = {"chunk": chunk, "rows_end": length, "tokens": tokens, "heads": heads, "D": dim}
    for head in range(0, places, at_once):
        count = min(at_once, places - head)
        for start in range(0, length, chunk):
            part = {**shared, "first_head": head, "first_row": start}
            launch(
                _probabilities_kernel,
                (count * triton.cdiv(chunk, first["BM"]) * tiles,),
                q,
                **{"q": q, "q_b": q.stride(0), "q_n": q.stride(1)},
                **{"k": k, "k_b": batch_stride(k), "k_l": k.stride(1)},
                **{"probabilities": probabilities, "highest_out": highest, "total_out": total},
                **{"score_scale": scale * LOG2_E},
                **part,
                **first,
            )
            launch(
                _output_kernel,
                (count * triton.cdiv(chunk, second["BM"]) * triton.cdiv(dim, second["BN"]),),
                q,
                **{"probabilities": probabilities, "highest_in": highest, "total_in": total},
                **{"v": v, "v_b": batch_stride(v), "v_l": v.stride(1)},
                **{"out": out, "out_b": out.stride(0), "out_n": out.stride(1), "KEYS": first["BN"]},
                **part,
                **second,
            )
