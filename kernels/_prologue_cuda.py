"""What `linear` and `conv2d` do before the product by CUDA C++ kernels, instead of the Triton kernel of `_prologue.py`.

Rows that are neither normalised nor activated are the same bit by bit; others agree within the roundings of float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vpd_fast import _native
from vpd_fast.errors import InputError
from vpd_fast.kernels import recording
from vpd_fast.kernels._gemm_cuda import FACTORS, aligned, name_of, strides_of

CHANNELS = 8  # that a thread handles at a time


def refuse(x: Tensor, x2: Tensor | None, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot prepare rows of these sources in that dtype, or None."""
    if dtype not in FACTORS:
        return f"weight is {dtype}; rows are rounded to 8 and 16 bits"
    channels = sum(t.shape[-1] for t in (x, x2) if t is not None)
    if channels % CHANNELS:
        return f"{channels} channels are no multiple of {CHANNELS}"
    return _native.why_missing("_C_cuda")


def readable(x: Tensor, x2: Tensor | None) -> list[Tensor]:
    """The sources as the kernels read them: of one type and of whole vectors of channels, joined where they are not."""
    sources = [t for t in (x, x2) if t is not None]
    if any(t.dtype != x.dtype or t.shape[3] % CHANNELS for t in sources):
        sources = [torch.cat([t.float() for t in sources], dim=3)]
    return [t for t in map(aligned, sources) if t is not None]


def fill(
    x: Tensor,
    x2: Tensor | None,
    out: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    *,
    padding: Sequence[int],
    norm: bool,
    eps: float,
    scale_shift: Tensor | None,
    silu: bool,
    input_scale: Tensor | None,
    per_image: bool,
    ranges: Tensor | None,
) -> None:
    """Fills out (B, tall, wide, C), scales and zeros of 8 bits. Others: as in `vpd_fast.kernels._prologue.prepare`.

    Raises InputError for what the kernels cannot compute.
    """
    if recording.state.record is not None:
        return
    sources = readable(x, x2)
    scale_shift, input_scale = (None if t is None else aligned_vector(t) for t in (scale_shift, input_scale))
    address = lambda t: 0 if t is None else t.data_ptr()  # noqa: E731
    call = _native.load("_C_cuda").Prologue(
        sources=[(t.data_ptr(), strides_of(t), t.shape[3]) for t in sources],
        dtype=name_of(sources[0].dtype),
        shape=tuple(x.shape[:3]),
        padded=(*padding[:2], *out.shape[1:3]),
        scale_shift=address(scale_shift),
        factors=address(input_scale),
        norm=norm,
        eps=eps,
        silu=silu,
        out=out.data_ptr(),
        out_dtype=name_of(out.dtype),
        scales=address(scales),
        zeros=address(zeros),
    )
    device, stream = x.get_device(), torch.cuda.current_stream(x.device).cuda_stream

    def run(rounding: str, ranges: Tensor | None = None) -> None:
        parts: Any = 0 if ranges is None else ranges.shape[2]
        try:
            call.run(rounding, address(ranges), parts, device, stream)
        except ValueError as error:
            raise InputError(f"the kernels in CUDA C++ cannot prepare these rows: {error}") from error

    if scales is None or not per_image:
        run("plain" if scales is None else "row")
        return
    if ranges is None:
        ranges = x.new_empty((x.shape[0], 2, call.parts(device)), dtype=torch.float32)
        run("range", ranges)
    run("image", ranges)


def aligned_vector(x: Tensor) -> Tensor:
    """The same numbers, contiguous, at an address that kernels can read 16 bytes at a time."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
