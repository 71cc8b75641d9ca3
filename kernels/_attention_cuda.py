"""Attention by the CUDA C++ kernels with wgmma (compute capability 9.0): without maps, and with those of few tokens."""

from typing import Any

import torch
from torch import Tensor

from vpd_fast import _native
from vpd_fast.errors import InputError
from vpd_fast.kernels import recording

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 160
ALIGNMENT = 8  # elements, of head dimensions and strides: 16 bytes
ORDER = "auto"  # or "sequential", "overlapped", "polynomial", see csrc/cuda/self_attention.h
GROUPS = 0  # warpgroups that compute in a block without maps, 0: chosen
MAX_TOKENS = 160  # with maps
WARPGROUPS = 0  # that compute in a block with maps, 0: chosen


def refuse(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> str | None:
    """Why the kernel cannot compute attention of these tensors, or None if it can."""
    if q.device.type != "cuda":
        return f"q is on {q.device}, not on a GPU"
    if q.dtype not in DTYPES:
        return f"q is {q.dtype}, not of 16 bits"
    if torch.cuda.get_device_capability(q.device) != (9, 0):
        return f"{torch.cuda.get_device_name(q.device)} has no wgmma (compute capability 9.0 has)"
    dim = q.shape[2] // heads
    if dim % ALIGNMENT or dim > MAX_HEAD_DIM:
        return f"a head has {dim} channels; this takes multiples of {ALIGNMENT} up to {MAX_HEAD_DIM}"
    if scale < 0:
        return f"the scale is negative ({scale})"
    return _native.why_missing("_C_cuda")


def _strides(x: Tensor) -> tuple[int, int]:
    """Distances of images and of rows in elements; 0 where there is one only, whose distance may be anything."""
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0


def readable(x: Tensor, shared: bool = True) -> Tensor:
    """(B, N, C), copied unless TMA can read its rows where they are. shared: whether images may be one in memory."""
    image, row = _strides(x)
    fits = x.stride(2) == 1 and x.data_ptr() % (2 * ALIGNMENT) == 0 and not (image % ALIGNMENT or row % ALIGNMENT)
    distinct = (row > 0 or x.shape[1] == 1) and (image > 0 or x.shape[0] == 1 or shared)
    return x if fits and distinct else torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x)


def readable_rows(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as TMA can read them; all images may share k and v, but not one of the two alone."""
    q, k, v = readable(q, shared=False), readable(k), readable(v)
    if (_strides(k)[0] == 0) != (_strides(v)[0] == 0):
        k, v = readable(k, shared=False), readable(v, shared=False)
    return q, k, v


def writable(out: Tensor) -> bool:
    """Whether the kernel can write rows where they are, two channels at a time."""
    return (
        out.stride(2) == 1
        and out.data_ptr() % (2 * out.itemsize) == 0
        and not any(stride % 2 for stride in _strides(out))
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, heads: int, scale: float, rounding: Tensor | None = None
) -> None:
    """Fills `out` (B, N, heads * D), whose channels are next to each other, with softmax(scale * q k^T) v.

    q: (B, N, heads * D); k, v: (B or 1, M, heads * D), all bfloat16 or float16. rounding: (2, heads * D), rows
    contiguous, by which the result becomes int8, or None. Raises InputError for what the kernel cannot compute.
    """
    if recording.state.record is not None:
        return
    q, k, v = readable_rows(q, k, v)
    try:
        _native.load("_C_cuda").self_attention(
            tensors=[(x.data_ptr(), _strides(x)) for x in (q, k, v, out)],
            dtype=str(q.dtype).removeprefix("torch."),
            shape=(*q.shape[:2], k.shape[1], heads, q.shape[2] // heads),
            scale=scale,
            order=ORDER,
            groups=GROUPS,
            device=q.get_device(),
            stream=torch.cuda.current_stream(q.device).cuda_stream,
            rounding=(0, 0) if rounding is None else (rounding[0].data_ptr(), rounding[1].data_ptr()),
        )
    except ValueError as error:
        raise InputError(f"impl='cuda' cannot compute this attention: {error}") from error


def forward_maps(arguments: tuple[Any, ...], q: Tensor) -> None:
    """Attention with maps on q's device; `arguments`: those of `_C_cuda.cross_attention_maps` up to its schedule.

    Raises InputError for what the kernel cannot compute.
    """
    if recording.state.record is not None:
        return
    stream = torch.cuda.current_stream(q.device).cuda_stream
    try:
        _native.load("_C_cuda").cross_attention_maps_wgmma(*arguments, WARPGROUPS, q.get_device(), stream)
    except ValueError as error:
        raise InputError(f"impl='wgmma' cannot compute this attention: {error}") from error
