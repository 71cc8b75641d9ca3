"""Argmax over channels of bilinearly resized logits, without the resized logits.

The two operators differ only in their taps (see `taps.py`): `upsample_argmax` resizes one map, and
`upsample_argmax_windows` merges the maps of a sliding window and resizes the result. On a GPU the CUDA C++ kernel comes
first, because it starts without compiling; the Triton kernel serves installations without it, and any number of taps.

Values that are not finite: NaN wins over every number and the first NaN over later ones, as in torch.argmax. A logit
whose weight is zero has no influence; `interpolate` makes a NaN of it if it is infinite.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from vpd_fast import _native
from vpd_fast.ops._checks import check, check_impl, check_size, check_tensor
from vpd_fast.ops._dispatch import Implementation, Op, register
from vpd_fast.ops.availability import triton_missing
from vpd_fast.ops.taps import Taps, resize_taps, window_taps

MOST_TAPS_CPU = 64  # MAX_TAPS in csrc/cpu/upsample_argmax.h
TAPS_CUDA = (2, 4, 8)  # that csrc/cuda/upsample_argmax.cu is compiled for
REFERENCE_ELEMENTS = 1 << 26  # resized logits the reference holds at a time


def upsample_argmax(
    logits: torch.Tensor, size: Sequence[int], *, align_corners: bool = False, impl: str = "auto"
) -> torch.Tensor:
    """Labels at a higher (or lower) resolution: argmax over channels of the bilinear resize of `logits`.

    Equal to `interpolate(logits.float(), size, mode="bilinear", align_corners=align_corners).argmax(1)`, except where
    two channels are equal up to float32 rounding. Of equal channels the lowest wins.

    logits: (B, C, h, w) float32, bfloat16 or float16, any strides; computed in float32.
    size: (H, W) in pixels. impl: "auto", "cuda", "cpu", "triton" or "reference".
    Returns (B, H, W) int64, as torch.argmax does. Raises InputError for a wrong shape, dtype, size or impl.
    """
    return torch.ops.vpd_fast.upsample_argmax(*_check(logits, size, align_corners=align_corners), check_impl(impl))


def upsample_argmax_windows(
    logits: torch.Tensor,
    ys: Sequence[int],
    xs: Sequence[int],
    *,
    crop_size: Sequence[int],
    image_size: Sequence[int],
    size: Sequence[int] | None = None,
    padded_size: Sequence[int] | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Labels of sliding-window inference, from the low-resolution logits of its windows.

    Each window's logits are resized to `crop_size` and placed in the image; overlapping windows are averaged; the
    image is resized to `size`; then argmax over channels. All resizing is bilinear with align_corners=False.

    logits: (B, len(ys) * len(xs), C, h, w) float32, bfloat16 or float16, any strides: window (y, x) of the grid is
        number y * len(xs) + x. ys, xs: top and left edges of the windows in the image, in pixels.
    crop_size, image_size, size: (height, width) in pixels; `size` defaults to `image_size`.
    padded_size: what the logits are resized to, if windows were padded at the right and bottom; the top left crop_size
        of it is used. Defaults to crop_size.
    Returns (B, *size) int64. Raises InputError for a wrong shape, dtype, size or impl, for windows that leave the
    image, and for windows that do not cover it.
    """
    arguments = _check_windows(
        logits, ys, xs, crop_size=crop_size, image_size=image_size, size=size, padded_size=padded_size
    )
    return torch.ops.vpd_fast.upsample_argmax_windows(*arguments, check_impl(impl))


def _check(logits: torch.Tensor, size: Sequence[int], *, align_corners: bool = False) -> tuple:
    check_tensor("logits", logits, "B C h w", may_be_empty="B")
    return logits, check_size("size", size), align_corners


def _check_windows(
    logits: torch.Tensor,
    ys: Sequence[int],
    xs: Sequence[int],
    *,
    crop_size: Sequence[int],
    image_size: Sequence[int],
    size: Sequence[int] | None = None,
    padded_size: Sequence[int] | None = None,
) -> tuple:
    for name, starts in (("ys", ys), ("xs", xs)):
        check(
            len(starts) > 0 and all(isinstance(start, int) for start in starts),
            f"{name} must be one or more integers, the edges of the windows in pixels, got {starts!r}",
        )
    check_tensor("logits", logits, "B windows C h w", may_be_empty="B", windows=len(ys) * len(xs))
    crop_size, image_size = check_size("crop_size", crop_size), check_size("image_size", image_size)
    size = image_size if size is None else check_size("size", size)
    padded_size = crop_size if padded_size is None else check_size("padded_size", padded_size)
    return logits, tuple(ys), tuple(xs), padded_size, crop_size, image_size, size


# Both operators come down to this: logits (B, grid_y, grid_x, C, h, w), row taps over grid_y * h, column taps over
# grid_x * w.
Problem = tuple[torch.Tensor, Taps, Taps]


def _problem(logits: torch.Tensor, size: Sequence[int], align_corners: bool) -> Problem:
    rows, columns = (resize_taps(logits.shape[2 + i], int(size[i]), align_corners) for i in range(2))
    return logits[:, None, None], rows, columns


def _problem_windows(
    logits: torch.Tensor,
    ys: Sequence[int],
    xs: Sequence[int],
    padded_size: Sequence[int],
    crop_size: Sequence[int],
    image_size: Sequence[int],
    size: Sequence[int],
) -> Problem:
    rows, columns = (
        window_taps(
            logits.shape[3 + i], tuple(starts), *(int(s[i]) for s in (padded_size, crop_size, image_size, size))
        )
        for i, starts in enumerate((ys, xs))
    )
    return logits.unflatten(1, (len(ys), len(xs))), rows, columns


def _reference(logits: torch.Tensor, rows: Taps, columns: Taps) -> torch.Tensor:
    merged = logits.float().permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    wide = _resample(merged, *columns.padded(columns.most, logits.device), dim=3)
    sources, weights = rows.padded(rows.most, logits.device)
    at_once = max(1, REFERENCE_ELEMENTS // max(1, wide[:, :, 0].numel()))
    parts = zip(sources.split(at_once), weights.split(at_once), strict=True)
    return torch.cat([_resample(wide, *part, dim=2).argmax(1) for part in parts], dim=1)


def _resample(x: torch.Tensor, sources: torch.Tensor, weights: torch.Tensor, dim: int) -> torch.Tensor:
    """Replaces dimension `dim`, 2 or 3, of (B, C, rows, columns) by weighted sums; sources, weights: (n_out, taps)."""
    if dim == 2:
        weights = weights[:, :, None]
    return sum(x.index_select(dim, sources[:, tap]) * weights[:, tap] for tap in range(sources.shape[1]))


def _cpu_refuses(logits: torch.Tensor, rows: Taps, columns: Taps) -> str | None:
    if logits.device.type != "cpu":
        return f"logits are on {logits.device}, not on the CPU"
    return _too_many_taps(rows, columns, MOST_TAPS_CPU) or _native.why_missing("_C")


def _too_many_taps(rows: Taps, columns: Taps, most: int) -> str | None:
    taps = max(rows.most, columns.most)
    return f"an output pixel reads {taps} logits along an axis; this takes at most {most}" if taps > most else None


def _cpu(logits: torch.Tensor, rows: Taps, columns: Taps, isa: str | None = None) -> torch.Tensor:
    logits = logits.float()
    labels = logits.new_empty((logits.shape[0], len(rows.offsets) - 1, len(columns.offsets) - 1), dtype=torch.int64)
    batch, grid_y, _, channel, row, column = logits.stride()
    _, n_y, n_x, _, _, _ = logits.shape
    window = logits.stride(2) if n_x > 1 else grid_y
    _native.load("_C").upsample_argmax(
        logits.data_ptr(),
        logits.shape,
        (batch, window, channel, row, column),
        labels.data_ptr(),
        *(rows.offsets, rows.sources, rows.weights),
        *(columns.offsets, columns.sources, columns.weights),
        torch.get_num_threads(),
        isa or _native.isa(),
    )
    return labels


@functools.lru_cache(maxsize=64)
def _on_device(taps: Taps, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return taps.padded(count, device)


def _cuda_refuses(logits: torch.Tensor, rows: Taps, columns: Taps) -> str | None:
    if logits.device.type != "cuda":
        return f"logits are on {logits.device}, not on a GPU"
    return _too_many_taps(rows, columns, TAPS_CUDA[-1]) or _native.why_missing("_C_cuda")


def _cuda(logits: torch.Tensor, rows: Taps, columns: Taps) -> torch.Tensor:
    count = next(taps for taps in TAPS_CUDA if taps >= max(rows.most, columns.most))
    row_sources, row_weights = _on_device(rows, count, logits.device)
    column_sources, column_weights = _on_device(columns, count, logits.device)
    labels = logits.new_empty((logits.shape[0], len(row_sources), len(column_sources)), dtype=torch.int64)
    batch, grid_y, grid_x, channel, row, column = logits.stride()
    _native.load("_C_cuda").upsample_argmax(
        logits.data_ptr(),
        str(logits.dtype).removeprefix("torch."),
        logits.shape,
        (batch, grid_y, grid_x, channel, row, column),
        labels.data_ptr(),
        labels.shape[1:],
        (row_sources.data_ptr(), row_weights.data_ptr()),
        (column_sources.data_ptr(), column_weights.data_ptr()),
        count,
        logits.device.index,
        torch.cuda.current_stream(logits.device).cuda_stream,
    )
    return labels


def _triton_refuses(logits: torch.Tensor, rows: Taps, columns: Taps) -> str | None:
    return triton_missing(logits, "logits")


@functools.lru_cache(maxsize=64)
def _offsets(
    taps: Taps, count: int, length: int, strides: tuple[int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets int64 within an image, of windows of that length with strides (grid, position), and weights."""
    sources, weights = taps.padded(count, torch.device("cpu"))
    sources = sources.long()
    return (sources // length * strides[0] + sources % length * strides[1]).to(device), weights.to(device)


def _triton(logits: torch.Tensor, rows: Taps, columns: Taps) -> torch.Tensor:
    from vpd_fast.kernels import upsample_argmax as kernels

    labels = logits.new_empty((logits.shape[0], len(rows.offsets) - 1, len(columns.offsets) - 1), dtype=torch.int64)
    if labels.numel():
        count = kernels.taps_for(max(rows.most, columns.most))
        axes = ((rows, 1, 4), (columns, 2, 5))  # taps, dimension of the grid, dimension within a window
        tables = (
            _offsets(taps, count, logits.shape[i], (logits.stride(grid), logits.stride(i)), logits.device)
            for taps, grid, i in axes
        )
        kernels.forward(logits, *tables, labels)
    return labels


def _implementations(problem: object) -> tuple[Implementation, ...]:
    return tuple(
        Implementation(
            name,
            run=lambda *args, run=run: run(*problem(*args)),
            refuse=lambda *args, refuse=refuse: refuse(*problem(*args)),
        )
        for name, run, refuse in (
            ("cuda", _cuda, _cuda_refuses),
            ("cpu", _cpu, _cpu_refuses),
            ("triton", _triton, _triton_refuses),
            ("reference", _reference, lambda *_: None),
        )
    )


register(
    Op(
        name="upsample_argmax",
        arguments="Tensor logits, SymInt[2] size, bool align_corners",
        returns="Tensor",
        fake=lambda logits, size, align_corners, impl: logits.new_empty((logits.shape[0], *size), dtype=torch.int64),
        check=_check,
        implementations=_implementations(_problem),
    )
)

register(
    Op(
        name="upsample_argmax_windows",
        arguments=(
            "Tensor logits, SymInt[] ys, SymInt[] xs, "
            "SymInt[2] padded_size, SymInt[2] crop_size, SymInt[2] image_size, SymInt[2] size"
        ),
        returns="Tensor",
        fake=lambda logits, ys, xs, padded_size, crop_size, image_size, size, impl: logits.new_empty(
            (logits.shape[0], *size), dtype=torch.int64
        ),
        check=_check_windows,
        implementations=_implementations(_problem_windows),
    )
)
