"""The product of `linear` and `conv2d`: rows times a weight, and what follows it.

A row is what one output position reads, gathered while it is loaded: for `linear` the position itself, for `conv2d` its
neighbourhood. A tile of the result is computed by one program, or by several that share the columns of the rows; their
sums are added in a fixed order by a second kernel, so no result depends on who comes first.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from vpd_fast.kernels import _gemm_cuda, tuning
from vpd_fast.kernels._common import UNFUSED, dot, image_arguments, launch, rounded, rounding_arguments, to_int8
from vpd_fast.kernels._library import library_sums
from vpd_fast.kernels._prologue import Geometry, Rows
from vpd_fast.kernels._statistics import PLANES, partial, store_planes

# What kernels are not compiled anew for, as machine code would hardly gain: integers that change with the number of
# images or between few values, and whether sizes are multiples of 16.
VARYING = ("total_rows", "top", "left")
SIZES = ("height", "width", "out_height", "out_width", "rows_per_scale")


@triton.jit
def _add_source(
    acc, a, a_b, a_y, a_x, height, width, channels, first, all_channels, weight, k_total,
    rows_b, rows_y, rows_x, valid, columns, in_n, begin, end,
    KW: tl.constexpr, BK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """acc + the products of one source's channels, the steps begin to end of taps x blocks of channels.

    MASKED: taps may be outside of the image, where it is zero.
    """
    blocks = tl.cdiv(channels, BK)
    images = a + (rows_b * a_b)[:, None]
    weights = (columns * k_total + first)[:, None]
    for i in range(begin, end):
        tap = i // blocks
        c = (i % blocks) * BK + tl.arange(0, BK)
        y = rows_y + tap // KW
        x = rows_x + tap % KW
        inside = valid
        if MASKED:
            inside = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        in_k = (c < channels)[None, :]
        left = tl.load(images + (y * a_y + x * a_x)[:, None] + c[None, :], mask=inside[:, None] & in_k, other=0.0)
        places = weights + (tap * all_channels + c)[None, :]
        right = tl.load(weight + places, mask=in_n[:, None] & in_k, other=0.0)
        acc = dot(left, tl.trans(right), acc)
    return acc


@triton.jit
def _positions(rows, height, width):
    """Image, y and x of rows that count the positions of all images, which are fewer than 2^31."""
    rows = rows.to(tl.int32)  # 64-bit division is slow
    b = rows // (height * width)
    within = rows - b * (height * width)
    return b.to(tl.int64), within // width, within % width


@triton.jit
def _epilogue(
    acc, rows, n0, total_rows, N, out_height, out_width, row_scales, row_zeros, rows_per_scale, column_scales,
    weight_sums, bias, residual, r_b, r_y, r_x, out, o_b, o_y, o_x, round_factors, round_shifts,
    statistics, statistics_b,
    ACTIVATION: tl.constexpr, RUN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out = activation(scales * acc + bias) + residual, for the tile of these rows that begins at column n0.

    row_scales: None for rows of 8 bits whose columns were rounded by what made them. round_factors, round_shifts: of
    columns of the result, by which that becomes int8, or None.
    RUN: positions of which statistics are found; divides BM and the positions of an image.
    """
    valid = rows < total_rows
    columns = n0 + tl.arange(0, BN)
    in_n = columns < N
    values = acc
    if column_scales is not None:
        # Whole numbers are exact: |u8 - zero| is at most 255, and 65536 such products stay below 2^31.
        places = rows.to(tl.int32) // rows_per_scale
        if row_zeros is not None:
            zero = tl.load(row_zeros + places, mask=valid, other=0.0).to(tl.int32)
            total = tl.load(weight_sums + columns, mask=in_n, other=0.0).to(tl.int32)
            values = (acc - zero[:, None] * total[None, :]).to(tl.float32)
        scale = tl.load(column_scales + columns, mask=in_n, other=0.0)[None, :]
        if row_scales is not None:
            scale *= tl.load(row_scales + places, mask=valid, other=0.0)[:, None]
        values = values.to(tl.float32) * scale
    if bias is not None:
        values += tl.load(bias + columns, mask=in_n, other=0.0)[None, :]
    if ACTIVATION == "relu":
        values = tl.where(values < 0, 0.0, values)  # keeps NaN
    if ACTIVATION == "silu":
        values = values / (1.0 + tl.exp(-values))
    if ACTIVATION == "geglu":  # runs of 16 values and of their 16 gates take turns
        pairs = tl.permute(tl.reshape(values, (BM, BN // 32, 2, 16)), (0, 1, 3, 2))
        values, gates = tl.split(pairs)
        values = values * (0.5 * gates * (1.0 + tl.erf(gates * 0.7071067811865476)))
        values = tl.reshape(values, (BM, BN // 2))
        columns = n0 // 2 + tl.arange(0, BN // 2)
        in_n = columns < N // 2
    b, y, x = _positions(rows, out_height, out_width)
    inside = valid[:, None] & in_n[None, :]
    if residual is not None:
        places = residual + (b * r_b + y * r_y + x * r_x)[:, None] + columns[None, :]
        values += tl.load(places, mask=inside, other=0.0).to(tl.float32)
    places = out + (b * o_b + y * o_y + x * o_x)[:, None] + columns[None, :]
    if round_factors is not None:
        values *= tl.load(round_factors + columns, mask=in_n, other=0.0)[None, :]
        stored = to_int8(values + tl.load(round_shifts + columns, mask=in_n, other=0.0)[None, :])
    else:
        stored = rounded(values, out.dtype.element_ty)
    tl.store(places, stored, mask=inside)
    if statistics is not None:
        width: tl.constexpr = BN // 2 if ACTIVATION == "geglu" else BN
        _store_statistics(
            stored.to(tl.float32), tl.min(rows, 0), total_rows, columns, in_n, N // 2 if ACTIVATION == "geglu" else N,
            out_height * out_width, statistics, statistics_b, RUN, BM // RUN, width,
        )  # fmt: skip


@triton.jit
def _store_statistics(
    values, first_row, total_rows, columns, in_n, channels, positions, out, out_b,
    RUN: tl.constexpr, RUNS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Statistics of each column of a tile (RUNS * RUN, BN), as `_statistics.py` has them."""
    values = tl.reshape(values, (RUNS, RUN, BN))
    mean = tl.sum(values, 1) / RUN
    difference = values - mean[:, None, :]
    rest = tl.sum(difference, 1) / RUN
    deviations = tl.sum(difference * difference, 1) - RUN * rest * rest
    runs = (first_row // RUN).to(tl.int32) + tl.arange(0, RUNS)
    b = runs // (positions // RUN)
    run = runs - b * (positions // RUN)
    places = out + (b.to(tl.int64) * out_b + run * PLANES * channels)[:, None] + columns[None, :]
    inside = (runs.to(tl.int64) * RUN < total_rows)[:, None] & in_n[None, :]
    store_planes(places, inside, channels, mean, rest, deviations, tl.min(values, 1), tl.max(values, 1))


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=SIZES)
def _gemm_kernel(
    a, a_b, a_y, a_x, a_channels, a2, a2_b, a2_y, a2_x, a2_channels, height, width, stride, top, left,
    weight, total_rows, N, out_height, out_width, row_scales, row_zeros, rows_per_scale, column_scales, weight_sums,
    bias, residual, r_b, r_y, r_x, out, o_b, o_y, o_x, round_factors, round_shifts, statistics, statistics_b, partial,
    KH: tl.constexpr, KW: tl.constexpr, MASKED: tl.constexpr, ACTIVATION: tl.constexpr, RUN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of the result (axis 0), or one part of its sums (axis 1), which goes to partial (parts, rows, N)."""
    across = tl.cdiv(N, BN)
    down = tl.cdiv(total_rows, BM)
    # GROUP tiles of rows take turns, so that a part of the weight is used again while it is in the cache.
    group = tl.program_id(0) // (GROUP * across)
    tall = tl.minimum(down - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * across)
    rows = (group * GROUP + within % tall).to(tl.int64) * BM + tl.arange(0, BM)
    n0 = within // tall * BN
    columns = n0 + tl.arange(0, BN)
    valid, in_n = rows < total_rows, columns < N
    b, y, x = _positions(rows, out_height, out_width)
    y = y * stride - top
    x = x * stride - left
    channels = a_channels + a2_channels
    k_total = KH * KW * channels
    acc = tl.zeros((BM, BN), tl.int32 if a.dtype.element_ty == tl.int8 else tl.float32)
    steps = KH * KW * tl.cdiv(a_channels, BK)
    steps2 = KH * KW * tl.cdiv(a2_channels, BK)
    share = steps + steps2
    if partial is not None:
        share = tl.cdiv(share, tl.num_programs(1))
    begin = tl.program_id(1) * share
    end = begin + share
    acc = _add_source(
        acc, a, a_b, a_y, a_x, height, width, a_channels, 0, channels, weight, k_total,
        b, y, x, valid, columns, in_n, tl.minimum(begin, steps), tl.minimum(end, steps), KW, BK, MASKED,
    )  # fmt: skip
    if a2 is not None:
        begin, end = tl.maximum(begin - steps, 0), tl.minimum(tl.maximum(end - steps, 0), steps2)
        acc = _add_source(
            acc, a2, a2_b, a2_y, a2_x, height, width, a2_channels, a_channels, channels, weight, k_total,
            b, y, x, valid, columns, in_n, begin, end, KW, BK, MASKED,
        )  # fmt: skip
    if partial is not None:
        places = partial + ((tl.program_id(1).to(tl.int64) * total_rows + rows) * N)[:, None] + columns[None, :]
        tl.store(places, acc, mask=valid[:, None] & in_n[None, :])
    else:
        _epilogue(
            acc, rows, n0, total_rows, N, out_height, out_width, row_scales, row_zeros, rows_per_scale, column_scales,
            weight_sums, bias, residual, r_b, r_y, r_x, out, o_b, o_y, o_x, round_factors, round_shifts,
            statistics, statistics_b,
            ACTIVATION, RUN, BM, BN,
        )  # fmt: skip


@triton.jit(do_not_specialize=("parts", *VARYING), do_not_specialize_on_alignment=SIZES)
def _merge_kernel(
    partial, parts, total_rows, N, out_height, out_width, row_scales, row_zeros, rows_per_scale, column_scales,
    weight_sums, bias, residual, r_b, r_y, r_x, out, o_b, o_y, o_x, round_factors, round_shifts,
    statistics, statistics_b,
    ACTIVATION: tl.constexpr, RUN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Adds the parts of the sums of one tile and finishes it."""
    across = tl.cdiv(N, BN)
    rows = (tl.program_id(0) // across).to(tl.int64) * BM + tl.arange(0, BM)
    n0 = tl.program_id(0) % across * BN
    columns = n0 + tl.arange(0, BN)
    inside = (rows < total_rows)[:, None] & (columns < N)[None, :]
    places = partial + (rows * N)[:, None] + columns[None, :]
    acc = tl.load(places, mask=inside, other=0)
    acc = acc if acc.dtype == tl.int32 else acc.to(tl.float32)
    for i in range(1, parts):
        acc += tl.load(places + tl.cast(i, tl.int64) * total_rows * N, mask=inside, other=0)
    _epilogue(
        acc, rows, n0, total_rows, N, out_height, out_width, row_scales, row_zeros, rows_per_scale, column_scales,
        weight_sums, bias, residual, r_b, r_y, r_x, out, o_b, o_y, o_x, round_factors, round_shifts,
        statistics, statistics_b,
        ACTIVATION, RUN, BM, BN,
    )  # fmt: skip


@dataclass(frozen=True)
class Epilogue:
    """What becomes of the sums: activation(sums * scales + bias) + residual.

    column_scales, weight_sums: (N,) of an 8-bit weight. bias: (N,). residual: like the result, channels next to each
    other.
    statistics: (B, runs, PLANES, channels) of the result as it is stored, and the length of the runs. rounding: (2, N),
    factors and shifts by which the result becomes int8, for which there are no statistics.
    """

    column_scales: torch.Tensor | None = None
    weight_sums: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    activation: str = ""
    residual: torch.Tensor | None = None
    statistics: tuple[torch.Tensor, int] | None = None
    rounding: torch.Tensor | None = None


def gemm(
    rows: Rows,
    geometry: Geometry,
    weight: torch.Tensor,
    epilogue: Epilogue,
    out: torch.Tensor,
    backend: str = "triton",
    config: tuning.Config | None = None,
) -> None:
    """Fills out (B, OH, OW, N), or N / 2 for geglu, with the epilogue of rows times weight.

    rows: of the weight's dtype; their scales are of a whole image only if no position reads outside of it.
    weight: (N, KH * KW * channels) contiguous. out: channels next to each other.
    backend: "triton", "cuda" for the CUDA C++ kernels, or "library" for what `_library.refuse` takes. config: of the
    Triton kernels; None: `tuning.choose` says.
    """
    if backend != "cuda":
        _triton_gemm(rows, geometry, weight, epilogue, out, config, library=backend == "library")
        return
    found = _gemm_cuda.gemm(rows, geometry, weight, epilogue, out)
    if epilogue.statistics is not None and not found:
        partial(out.flatten(1, 2), epilogue.statistics[1], epilogue.statistics[0])


def _triton_gemm(
    rows: Rows,
    geometry: Geometry,
    weight: torch.Tensor,
    epilogue: Epilogue,
    out: torch.Tensor,
    config: tuning.Config | None,
    library: bool,
) -> None:
    """library: the sums are a library's, and Triton's kernel only finishes them."""
    a, a2 = rows.a, rows.a2
    batch, height, width, channels = a.shape
    n, k = weight.shape
    total_rows, positions = math.prod(out.shape[:3]), math.prod(out.shape[1:3])
    statistics, run = epilogue.statistics or (None, 1)
    run = run if positions % run == 0 else 1
    shape = tuning.GemmShape(
        *(str(a.dtype).removeprefix("torch."), geometry.kernel, geometry.stride, total_rows, n, k),
        channels if a2 is None else min(channels, a2.shape[3]),
        *(1 if a2 is None else 2, epilogue.activation, run),
    )
    image: dict[str, Any] = {
        **image_arguments("a", a),
        **{"a_channels": channels, "a2_channels": 0 if a2 is None else a2.shape[3]},
        **image_arguments("a2", a2),
        **{"height": height, "width": width, "stride": geometry.stride, "top": geometry.top, "left": geometry.left},
        **{"KH": geometry.kernel[0], "KW": geometry.kernel[1], "MASKED": geometry.reads_outside(height, width)},
    }
    epilogue_arguments: dict[str, Any] = {
        **{"total_rows": total_rows, "N": n, "out_height": geometry.out_height, "out_width": geometry.out_width},
        **{"row_scales": rows.scales, "row_zeros": rows.zeros},
        "rows_per_scale": 1 if rows.scales is None else max(1, total_rows // rows.scales.numel()),
        **{"column_scales": epilogue.column_scales, "weight_sums": epilogue.weight_sums, "bias": epilogue.bias},
        **image_arguments("residual", epilogue.residual, "r"),
        **image_arguments("out", out, "o"),
        **rounding_arguments(epilogue.rounding),
        **({} if epilogue.rounding is None else UNFUSED),
        "ACTIVATION": epilogue.activation,
    }

    def compute(config: tuning.Config | None) -> None:
        fused = statistics is not None and run > 1 and (config is None or config["BM"] % run == 0)
        fused_statistics: dict[str, Any] = {"statistics": None, "statistics_b": 0, "RUN": 1}
        if fused:
            fused_statistics = {"statistics": statistics, "statistics_b": statistics.stride(0), "RUN": run}
        if config is None:
            parts = library_sums(a, geometry, weight)
            _merge(parts, total_rows, n, **epilogue_arguments, **fused_statistics)
        else:
            tile = {name: value for name, value in config.items() if name != "SPLITS"}
            splits = config["SPLITS"]
            dtype = torch.int32 if a.dtype == torch.int8 else torch.float32
            parts = torch.empty(splits, total_rows, n, dtype=dtype, device=a.device) if splits > 1 else None
            tiles = triton.cdiv(total_rows, config["BM"]) * triton.cdiv(n, config["BN"])
            arguments = {**image, **epilogue_arguments, **fused_statistics, **tile}
            launch(_gemm_kernel, (tiles, splits), a, **arguments, weight=weight, partial=parts)
            if parts is not None:
                _merge(parts, total_rows, n, **epilogue_arguments, **fused_statistics)
        if epilogue.statistics is not None and not fused:
            partial(out.flatten(1, 2), epilogue.statistics[1], epilogue.statistics[0])

    compute(None if library else config or tuning.choose(shape, a.device, compute))


def _merge(parts: torch.Tensor, rows: int, n: int, **arguments: Any) -> None:
    bm = max(16, arguments["RUN"])
    tile = {"BM": bm, "BN": max(32, 1024 // bm), "num_warps": 4}
    tiles = triton.cdiv(rows, tile["BM"]) * triton.cdiv(n, tile["BN"])
    launch(_merge_kernel, (tiles,), parts, partial=parts, parts=len(parts), **arguments, **tile)
