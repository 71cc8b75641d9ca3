"""The product of `linear` and `conv2d` by the CUDA C++ kernels, in place of the Triton kernel `kernels/_product.py`.

Rows are prepared by the same Triton kernels, so the results of both differ by the order of float32 sums at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vpd_fast import _native
from vpd_fast.errors import InputError
from vpd_fast.ops import _gemm
from vpd_fast.ops.packing import FLOAT8

if TYPE_CHECKING:
    from vpd_fast.kernels._geometry import Geometry

FACTORS = (torch.int8, FLOAT8, torch.bfloat16, torch.float16)
ALIGNMENT = 16  # bytes, of channels, addresses and strides of what kernels copy
INSTRUCTIONS = "auto"  # or "mma", "wgmma", see csrc/cuda/gemm.h


def refuses(call: Any, prologue: tuple[Any, ...], padding: Sequence[int] = (0, 0, 0, 0)) -> str | None:
    """Why the CUDA kernels cannot compute an operator's arguments, or None.

    prologue: what is done to the rows, false if nothing.
    """
    x, x2, data = call.x, call.x2, call.data
    if x.device.type != "cuda":
        return f"x is on {x.device}, not on a GPU"
    reason = _gemm.triton_refuses(call, padding)  # whose kernels prepare the rows
    if reason is not None:
        return reason
    if data.dtype not in FACTORS:
        return f"weight is {data.dtype}; tensor cores multiply 8 and 16 bits"
    if data.dtype == FLOAT8 and torch.cuda.get_device_capability(x.device) != (9, 0):
        return f"{torch.cuda.get_device_name(x.device)} has no wgmma (compute capability 9.0 has)"
    widths = channels_of_sources(x, x2, data.dtype, prologue)
    if any(width * data.dtype.itemsize % ALIGNMENT for width in widths):
        return f"{' + '.join(map(str, widths))} channels of {data.dtype} are no multiple of {ALIGNMENT} bytes"
    return _native.why_missing("_C_cuda")


def channels_of_sources(x: Tensor, x2: Tensor | None, dtype: torch.dtype, prologue: tuple[Any, ...]) -> list[int]:
    """Of what is multiplied: a prologue, or rounding, joins the sources."""
    sources = [t for t in (x, x2) if t is not None]
    widths = [t.shape[-1] for t in sources]
    prepared = any(part is not None and part is not False for part in prologue)
    return [sum(widths)] if prepared or any(t.dtype != dtype for t in sources) else widths


def aligned(x: Tensor | None) -> Tensor | None:
    """(B, H, W, C), copied if kernels cannot read it 16 bytes at a time where it is."""
    if x is None:
        return None
    strides = (stride * x.itemsize for stride, size in zip(x.stride()[:3], x.shape, strict=False) if size > 1)
    fits = x.data_ptr() % ALIGNMENT == 0 and all(stride % ALIGNMENT == 0 for stride in strides)
    return x if fits else torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x)


def product(
    a: Tensor,
    a2: Tensor | None,
    geometry: Geometry,
    weight: Tensor,
    out: Tensor,
    *,
    column_scales: Tensor | None = None,
    sums: Tensor | None = None,
    row_scales: Tensor | None = None,
    row_zeros: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "",
    residual: Tensor | None = None,
    statistics: tuple[Tensor, int] | None = None,
) -> None:
    """As `vpd_fast.kernels._product.product`. Raises InputError for what the kernels cannot compute."""
    sources, weight = [aligned(t) for t in (a, a2) if t is not None], aligned(weight[None, None])[0, 0]
    rows = a.shape[0] * geometry.out_height * geometry.out_width
    vectors = row_scales, row_zeros, column_scales, sums
    call = _native.load("_C_cuda").Gemm(
        sources=[(x.data_ptr(), _strides(x), x.shape[3]) for x in sources],
        dtype=_name(weight.dtype),
        shape=(*a.shape[:3], geometry.out_height, geometry.out_width),
        geometry=(*geometry.kernel, geometry.stride, geometry.top, geometry.left),
        weight=weight.data_ptr(),
        n=len(weight),
        scales=tuple(0 if x is None else x.data_ptr() for x in vectors),
        scale_per_image=row_scales is not None and row_scales.numel() != rows,
        bias=0 if bias is None else bias.data_ptr(),
        activation=activation,
        residual=_image(residual),
        out=_image(out),
        instructions=INSTRUCTIONS,
    )
    device = a.get_device()
    try:
        size = call.scratch(device)
    except ValueError as error:
        raise InputError(f"impl='cuda' cannot compute this product: {error}") from error
    scratch = torch.empty(size // 4, dtype=torch.int32, device=a.device) if size else None
    stream = torch.cuda.current_stream(a.device).cuda_stream
    call.run(0 if scratch is None else scratch.data_ptr(), device, stream)
    if statistics is not None:
        from vpd_fast.kernels._statistics import partial

        partial(out.flatten(1, 2), statistics[1], statistics[0])


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of images, rows and columns in elements; 0 where there is one only, whose stride may be anything."""
    return tuple(stride if size > 1 else 0 for stride, size in zip(x.stride()[:3], x.shape, strict=False))


def _image(x: Tensor | None) -> tuple[int, str, tuple[int, ...]] | None:
    return None if x is None else (x.data_ptr(), _name(x.dtype), _strides(x))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
