"""The product of `linear` and `conv2d` by the CUDA C++ kernels, in place of the Triton kernel of `_gemm.py`.

Rows are prepared by the same Triton kernels, so the results of both differ by the order of float32 sums at most.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vpd_fast import _native
from vpd_fast.errors import InputError
from vpd_fast.kernels import recording

if TYPE_CHECKING:
    from vpd_fast.kernels._gemm import Epilogue
    from vpd_fast.kernels._prologue import Geometry, Rows

FLOAT8 = torch.float8_e4m3fn
FACTORS = (torch.int8, FLOAT8, torch.bfloat16, torch.float16)
ALIGNMENT = 16  # bytes, of channels, addresses and strides of what kernels copy
INSTRUCTIONS = "auto"  # or "mma", "wgmma", "wgmma_wide", "wgmma_persistent", "wgmma_cluster", see csrc/cuda/gemm.h


def refuse(x: Tensor, x2: Tensor | None, dtype: torch.dtype, prologue: bool) -> str | None:
    """Why the kernels cannot multiply these sources by a weight of that dtype, or None. prologue: whether there is one.

    What keeps rows from being prepared is another question.
    """
    if dtype not in FACTORS:
        return f"weight is {dtype}; tensor cores multiply 8 and 16 bits"
    if dtype == FLOAT8 and torch.cuda.get_device_capability(x.device) != (9, 0):
        return f"{torch.cuda.get_device_name(x.device)} has no wgmma (compute capability 9.0 has)"
    return alignment_refuses(x, x2, dtype, prologue) or _native.why_missing("_C_cuda")


def alignment_refuses(x: Tensor, x2: Tensor | None, dtype: torch.dtype, prologue: bool) -> str | None:
    """Why the sources have channels that kernels cannot copy, or None; arguments as for `refuse`."""
    widths = channels_of_sources(x, x2, dtype, prologue)
    if any(width * dtype.itemsize % ALIGNMENT for width in widths):
        return f"{' + '.join(map(str, widths))} channels of {dtype} are no multiple of {ALIGNMENT} bytes"
    return None


def channels_of_sources(x: Tensor, x2: Tensor | None, dtype: torch.dtype, prologue: bool) -> list[int]:
    """Channels of each factor that is read: a prologue, or rounding, joins the sources."""
    sources = [t for t in (x, x2) if t is not None]
    widths = [t.shape[-1] for t in sources]
    return [sum(widths)] if prologue or any(t.dtype != dtype for t in sources) else widths


def aligned(x: Tensor | None) -> Tensor | None:
    """(B, H, W, C), copied if kernels cannot read it 16 bytes at a time where it is."""
    if x is None:
        return None
    strides = (stride * x.itemsize for stride, size in zip(x.stride()[:3], x.shape, strict=False) if size > 1)
    fits = x.data_ptr() % ALIGNMENT == 0 and all(stride % ALIGNMENT == 0 for stride in strides)
    return x if fits else torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x)


def gemm(rows: "Rows", geometry: "Geometry", weight: Tensor, epilogue: "Epilogue", out: Tensor) -> bool:
    """As `vpd_fast.kernels._gemm.gemm`, but returns whether statistics were filled, if there are any to fill.

    Raises InputError for what the kernels cannot compute.
    """
    if recording.state.record is not None:
        return False
    sources = [aligned(t) for t in (rows.a, rows.a2) if t is not None]
    rows, weight = replace(rows, a=sources[0], a2=(*sources, None)[1]), aligned(weight[None, None])[0, 0]
    call, a = native_call(rows, geometry, weight, epilogue, out), rows.a
    device = a.get_device()
    try:
        size = call.scratch(device)
    except ValueError as error:
        raise InputError(f"impl='cuda' cannot compute this product: {error}") from error
    scratch = torch.empty(size // 4, dtype=torch.int32, device=a.device) if size else None
    stream = torch.cuda.current_stream(a.device).cuda_stream
    call.run(0 if scratch is None else scratch.data_ptr(), device, stream)
    return epilogue.statistics is not None and call.finds_statistics(device)


def native_call(rows: "Rows", geometry: "Geometry", weight: Tensor, epilogue: "Epilogue", out: Tensor) -> Any:
    """The product as the native module takes it; all tensors must live until it has run."""
    a, sources, residual, bias = (
        rows.a,
        [t for t in (rows.a, rows.a2) if t is not None],
        epilogue.residual,
        epilogue.bias,
    )
    positions = a.shape[0] * geometry.out_height * geometry.out_width
    vectors = rows.scales, rows.zeros, epilogue.column_scales, epilogue.weight_sums
    return _native.load("_C_cuda").Gemm(
        sources=[(x.data_ptr(), strides_of(x), x.shape[3]) for x in sources],
        dtype=name_of(weight.dtype),
        shape=(*a.shape[:3], geometry.out_height, geometry.out_width),
        geometry=(*geometry.kernel, geometry.stride, geometry.top, geometry.left),
        weight=weight.data_ptr(),
        n=len(weight),
        scales=tuple(0 if x is None else x.data_ptr() for x in vectors),
        scale_per_image=rows.scales is not None and rows.scales.numel() != positions,
        bias=0 if bias is None else bias.data_ptr(),
        activation=epilogue.activation,
        residual=_image(residual),
        out=_image(out),
        instructions=INSTRUCTIONS,
        statistics=_statistics(epilogue.statistics),
        rounding=_rounding(epilogue.rounding),
    )


def strides_of(x: Tensor) -> tuple[int, ...]:
    """Strides of images, rows and columns in elements; 0 where there is one only, whose stride may be anything."""
    return tuple(stride if size > 1 else 0 for stride, size in zip(x.stride()[:3], x.shape, strict=False))


def _image(x: Tensor | None) -> tuple[int, str, tuple[int, ...]] | None:
    return None if x is None else (x.data_ptr(), name_of(x.dtype), strides_of(x))


def _statistics(statistics: tuple[Tensor, int] | None) -> tuple[int, int, int] | None:
    return None if statistics is None else (statistics[0].data_ptr(), statistics[0].stride(0), statistics[1])


def _rounding(rounding: Tensor | None) -> tuple[int, int] | None:
    """Addresses of factors and shifts."""
    return None if rounding is None else (rounding[0].data_ptr(), rounding[1].data_ptr())


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
