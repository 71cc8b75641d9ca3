"""Argmax over channels of bilinearly resized logits, without the resized logits.

The two operators differ only in their weights (see `resampling.py`): `upsample_argmax` resizes one map, and
`upsample_argmax_windows` merges the maps of a sliding window and resizes the result. On a GPU without times the CUDA
C++ kernel comes first, because it starts without compiling; the Triton kernel takes any number of taps.

Values that are not finite: NaN wins over every number and the first NaN over later ones, as in torch.argmax. A logit
whose weight is zero has no influence; `interpolate` makes a NaN of it if it is infinite.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vpd_fast import _native
from vpd_fast.errors import InputError, brief
from vpd_fast.ops._checks import MAX_SIDE, check_flag, check_size, check_tensor, is_int
from vpd_fast.ops._choices import WORDS, Shape
from vpd_fast.ops._dispatch import Implementation, Op, SymInt, register
from vpd_fast.ops._layout import dtype_name
from vpd_fast.ops.availability import triton_missing
from vpd_fast.ops.resampling import ResamplingWeights, resize_weights, window_weights

MAX_TAPS_CPU = 64  # MAX_TAPS in csrc/cpu/upsample_argmax.h
TAPS_CUDA = (2, 4, 8)  # for which csrc/cuda/upsample_argmax.cu is compiled
TAPS_STRIPS, MAX_STRIP = 2, 8  # of csrc/cuda/upsample_argmax_strips.h; pixels
MAX_REFERENCE_ELEMENTS = 1 << 26  # resized logits that the reference holds at a time


def upsample_argmax(
    logits: torch.Tensor, size: Sequence[int], *, align_corners: bool = False, impl: str = "auto"
) -> torch.Tensor:
    """Labels at a higher (or lower) resolution: argmax over channels of the bilinear resize of `logits`.

    Equal to `interpolate(logits.float(), size, mode="bilinear", align_corners=align_corners).argmax(1)`, except where
    two channels are equal up to float32 rounding. Of equal channels the lowest wins.

    logits: (B, C, h, w) float32, bfloat16 or float16, any strides; computed in float32.
    size: (H, W) in pixels. impl: "auto", "cuda", "cpu", "triton", "cuda_strips" (CUDA C++, eight pixels a thread) or
        "reference".
    Returns (B, H, W) int64, as torch.argmax does. Raises InputError for a wrong shape, dtype, size or impl.
    """
    check_tensor("logits", logits, "B C h w", may_be_empty="B")
    check_flag("align_corners", align_corners)
    return UPSAMPLE_ARGMAX(UpsampleArgmaxArguments(logits, check_size("size", size), align_corners), impl)


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
    for name, starts in (("ys", ys), ("xs", xs)):
        if not isinstance(starts, Sequence) or not starts or not all(is_int(i) and abs(i) <= MAX_SIDE for i in starts):
            got = brief(starts)
            raise InputError(f"{name} must be one or more integers, the edges of the windows in pixels, got {got}")
    check_tensor("logits", logits, "B windows C h w", may_be_empty="B", windows=len(ys) * len(xs))
    crop_size, image_size = check_size("crop_size", crop_size), check_size("image_size", image_size)
    size = image_size if size is None else check_size("size", size)
    padded_size = crop_size if padded_size is None else check_size("padded_size", padded_size)
    arguments = UpsampleArgmaxWindowsArguments(logits, tuple(ys), tuple(xs), padded_size, crop_size, image_size, size)
    return UPSAMPLE_ARGMAX_WINDOWS(arguments, impl)


class Problem(NamedTuple):
    """The problem that both operators come down to.

    logits: (B, grid_y, grid_x, C, h, w). rows: weights over grid_y * h. columns: weights over grid_x * w.
    """

    logits: torch.Tensor
    rows: ResamplingWeights
    columns: ResamplingWeights

    @property
    def max_taps(self) -> int:
        """The largest number of logits that an output pixel reads along an axis."""
        return max(self.rows.max_taps, self.columns.max_taps)

    def empty_labels(self) -> torch.Tensor:
        """Memory for the labels (B, H, W)."""
        shape = (self.logits.shape[0], len(self.rows.offsets) - 1, len(self.columns.offsets) - 1)
        return self.logits.new_empty(shape, dtype=torch.int64)


@dataclass(frozen=True)
class UpsampleArgmaxArguments:
    """Arguments of the operator; see the public function."""

    logits: torch.Tensor
    size: Sequence[SymInt]
    align_corners: bool

    def public(self) -> dict[str, Any]:
        """Return the arguments of the public function that makes these."""
        return {name: getattr(self, name) for name in self.__match_args__}

    @property
    def problem(self) -> Problem:
        rows, columns = (
            resize_weights(self.logits.shape[2 + i], int(self.size[i]), self.align_corners) for i in range(2)
        )
        return Problem(self.logits[:, None, None], rows, columns)


@dataclass(frozen=True)
class UpsampleArgmaxWindowsArguments:
    """Arguments of the operator; see the public function."""

    logits: torch.Tensor
    ys: Sequence[SymInt]
    xs: Sequence[SymInt]
    padded_size: Sequence[SymInt]
    crop_size: Sequence[SymInt]
    image_size: Sequence[SymInt]
    size: Sequence[SymInt]

    def public(self) -> dict[str, Any]:
        """Return the arguments of the public function that makes these."""
        return {name: getattr(self, name) for name in self.__match_args__}

    @property
    def problem(self) -> Problem:
        sizes = (self.padded_size, self.crop_size, self.image_size, self.size)
        rows, columns = (
            window_weights(self.logits.shape[3 + i], tuple(starts), *(int(s[i]) for s in sizes))
            for i, starts in enumerate((self.ys, self.xs))
        )
        return Problem(self.logits.unflatten(1, (len(self.ys), len(self.xs))), rows, columns)


Arguments = UpsampleArgmaxArguments | UpsampleArgmaxWindowsArguments


def _reference(call: Arguments) -> torch.Tensor:
    logits, rows, columns = call.problem
    merged = logits.float().permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    wide = _resample(merged, *columns.padded(columns.max_taps, logits.device), dim=3)
    sources, weights = rows.padded(rows.max_taps, logits.device)
    at_once = max(1, MAX_REFERENCE_ELEMENTS // max(1, wide[:, :, 0].numel()))
    parts = zip(sources.split(at_once), weights.split(at_once), strict=True)
    return torch.cat([_resample(wide, *part, dim=2).argmax(1) for part in parts], dim=1)


def _resample(x: torch.Tensor, sources: torch.Tensor, weights: torch.Tensor, dim: int) -> torch.Tensor:
    """Replaces dimension `dim`, 2 or 3, of (B, C, rows, columns) by weighted sums; sources, weights: (n_out, taps)."""
    if dim == 2:
        weights = weights[:, :, None]
    result = x.index_select(dim, sources[:, 0]) * weights[:, 0]
    for tap in range(1, sources.shape[1]):
        result = result + x.index_select(dim, sources[:, tap]) * weights[:, tap]
    return result


def _cpu_refuses(call: Arguments) -> str | None:
    if call.logits.device.type != "cpu":
        return f"logits are on {call.logits.device}, not on the CPU"
    return _too_many_taps(call, MAX_TAPS_CPU) or _native.why_missing("_C")


def _too_many_taps(call: Arguments, limit: int) -> str | None:
    taps = call.problem.max_taps
    return f"an output pixel reads {taps} logits along an axis; this takes at most {limit}" if taps > limit else None


def _cpu(call: Arguments) -> torch.Tensor:
    problem = call.problem
    logits, rows, columns = problem.logits.float(), problem.rows, problem.columns
    labels = problem.empty_labels()
    batch, grid_y, grid_x, channel, row, column = logits.stride()
    window = grid_x if logits.shape[2] > 1 else grid_y
    _native.run(
        "upsample_argmax",
        logits.data_ptr(),
        logits.shape,
        (batch, window, channel, row, column),
        labels.data_ptr(),
        *(rows.offsets, rows.sources, rows.weights),
        *(columns.offsets, columns.sources, columns.weights),
        torch.get_num_threads(),
        _native.isa(),
    )
    return labels


@functools.lru_cache(maxsize=64)
def _on_device(weights: ResamplingWeights, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return weights.padded(count, device)


def _cuda_refuses(call: Arguments) -> str | None:
    if call.logits.device.type != "cuda":
        return f"logits are on {call.logits.device}, not on a GPU"
    return _too_many_taps(call, TAPS_CUDA[-1]) or _native.why_missing("_C_cuda")


def _cuda_strips_refuses(call: Arguments) -> str | None:
    if call.logits.device.type != "cuda":
        return f"logits are on {call.logits.device}, not on a GPU"
    return _too_many_taps(call, TAPS_STRIPS) or _native.why_missing("_C_cuda")


@functools.lru_cache(maxsize=64)
def _strips(columns: ResamplingWeights, device: torch.device) -> torch.Tensor:
    """Returns int32 (strips + 1): where runs of at most MAX_STRIP pixels begin that read the same two columns."""
    sources, _ = columns.padded(TAPS_STRIPS, torch.device("cpu"))
    begins = [0]
    for i, changes in enumerate((sources[1:] != sources[:-1]).any(1).tolist(), start=1):
        if changes or i - begins[-1] == MAX_STRIP:
            begins.append(i)
    return torch.tensor([*begins, len(sources)], dtype=torch.int32).to(device)


def _cuda(call: Arguments, strips: bool = False) -> torch.Tensor:
    problem = call.problem
    logits = problem.logits
    count = next(taps for taps in TAPS_CUDA if taps >= problem.max_taps)
    row_sources, row_weights = _on_device(problem.rows, count, logits.device)
    column_sources, column_weights = _on_device(problem.columns, count, logits.device)
    labels = problem.empty_labels()
    arguments = (
        logits.data_ptr(),
        dtype_name(logits),
        logits.shape,
        logits.stride(),
        labels.data_ptr(),
        labels.shape[1:],
        (row_sources.data_ptr(), row_weights.data_ptr()),
        (column_sources.data_ptr(), column_weights.data_ptr()),
    )
    where = logits.get_device(), torch.cuda.current_stream(logits.device).cuda_stream
    if strips:
        begins = _strips(problem.columns, logits.device)
        _native.load("_C_cuda").upsample_argmax_strips(*arguments, begins.data_ptr(), len(begins) - 1, *where)
    else:
        _native.load("_C_cuda").upsample_argmax(*arguments, count, *where)
    return labels


def _triton_refuses(call: Arguments) -> str | None:
    return triton_missing(call.logits, "logits")


@functools.lru_cache(maxsize=64)
def _offsets(
    weights: ResamplingWeights, count: int, length: int, strides: tuple[int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns int64 offsets within an image, of windows of that length with strides (grid, position), and weights."""
    sources, values = weights.padded(count, torch.device("cpu"))
    sources = sources.long()
    return (sources // length * strides[0] + sources % length * strides[1]).to(device), values.to(device)


def _triton(call: Arguments) -> torch.Tensor:
    from vpd_fast.kernels import upsample_argmax as kernels

    problem = call.problem
    logits, labels = problem.logits, problem.empty_labels()
    if labels.numel():
        count = kernels.taps_for(problem.max_taps)
        axes = ((problem.rows, 1, 4), (problem.columns, 2, 5))  # weights, dimension of the grid, within a window
        rows, columns = (
            _offsets(weights, count, logits.shape[i], (logits.stride(grid), logits.stride(i)), logits.device)
            for weights, grid, i in axes
        )
        kernels.forward(logits, rows, columns, labels)
    return labels


def _fake(call: Arguments) -> torch.Tensor:
    return call.logits.new_empty((call.logits.shape[0], *call.size), dtype=torch.int64)


def _shape_of(call: Arguments) -> Shape:
    """Returns what decides which implementation is fastest; sizes: channels, pixels of all images."""
    logits, rows, columns = problem = call.problem
    pixels = logits.shape[0] * (len(rows.offsets) - 1) * (len(columns.offsets) - 1)
    return Shape(f"{WORDS[logits.dtype]} taps{problem.max_taps}", (logits.shape[3], pixels))


IMPLEMENTATIONS = (
    Implementation("cuda", _cuda, _cuda_refuses),
    Implementation("cpu", _cpu, _cpu_refuses),
    Implementation("triton", _triton, _triton_refuses),
    Implementation("cuda_strips", functools.partial(_cuda, strips=True), _cuda_strips_refuses),
    Implementation("reference", _reference),
)
UPSAMPLE_ARGMAX, UPSAMPLE_ARGMAX_WINDOWS = (
    register(
        Op(
            f.__name__,
            arguments,
            public=f,
            returns="Tensor",
            fake=_fake,
            shape=_shape_of,
            measured_as="upsample_argmax",
            implementations=IMPLEMENTATIONS,
        )
    )
    for f, arguments in (
        (upsample_argmax, UpsampleArgmaxArguments),
        (upsample_argmax_windows, UpsampleArgmaxWindowsArguments),
    )
)
