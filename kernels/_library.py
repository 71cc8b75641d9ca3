"""The sums of a product by the libraries of PyTorch, where those are faster: cuBLAS, and cuDNN for convolutions.

They leave sums of float32 or int32, and cuDNN of bfloat16 or float16, to which `_gemm.py` then applies its epilogue.
"""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vpd_fast.kernels._prologue import Geometry
    from vpd_fast.ops.conv2d import Conv2dArguments
    from vpd_fast.ops.linear import LinearArguments

ALIGNED = {torch.int8: 8, torch.float8_e4m3fn: 16}  # of which n and k must be multiples
MIN_ROWS = 17  # of _int_mm


def refuse(call: "LinearArguments | Conv2dArguments") -> str | None:
    """Why a library cannot compute the sums of a product, or None.

    What keeps rows from being prepared, or sums from being finished, is another question.
    """
    dtype = call.data.dtype
    sources = [t for t in (call.x, call.x2) if t is not None]
    prepared = call.has_prologue or any(t.dtype != dtype for t in sources)  # joins sources and pads images
    if len(sources) > 1 and not prepared:
        return "there are two sources, and nothing to be done that joins them"
    if getattr(call, "upsample", False):
        return "the image is to be enlarged"
    if tuple(getattr(call, "kernel", (1, 1))) != (1, 1) or getattr(call, "stride", 1) > 1:
        return _convolution_refuses(call, prepared)
    settings = torch.backends.cuda.matmul
    if dtype == torch.float32 and settings.allow_tf32:
        return "PyTorch may round factors to TF32 (torch.backends.cuda.matmul.allow_tf32)"
    if dtype == torch.float16 and getattr(settings, "allow_fp16_accumulation", False):
        return "PyTorch may sum in float16 (torch.backends.cuda.matmul.allow_fp16_accumulation)"
    multiple, rows = ALIGNED.get(dtype, 1), call.out[..., 0].numel()
    if call.n % multiple or call.columns % multiple:
        return f"weight is {call.n}x{call.columns}; this takes multiples of {multiple}"
    if dtype == torch.int8 and rows < MIN_ROWS:
        return f"there are {rows} rows; this takes at least {MIN_ROWS} in 8 bits"
    if prepared:
        return None
    if any(call.margins):
        return "padding is not prepared"
    spaced = call.x.is_contiguous() or call.x.stride(-1) != 1  # and then copied
    return None if spaced else "rows of x are not evenly spaced"


def _convolution_refuses(call: "Conv2dArguments", prepared: bool) -> str | None:
    dtype, out = call.data.dtype, call.out.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it is a convolution in {dtype}; this takes bfloat16 and float16"
    if out != dtype:  # which has more digits, or a wider range
        return f"cuDNN's sums are rounded to {dtype}, and out is {out}"
    top, left, _, _ = call.margins
    padded = call.x.shape[1] + 2 * top, call.x.shape[2] + 2 * left
    sides = ((size - kernel) // call.stride + 1 for size, kernel in zip(padded, call.kernel, strict=True))
    return None if prepared or tuple(sides) == call.out.shape[1:3] else "padding is not symmetric"


def library_sums(a: torch.Tensor, geometry: "Geometry", weight: torch.Tensor) -> torch.Tensor:
    """a times weight, (1, rows, n), neither scaled nor activated, for what `refuse` takes."""
    if geometry.kernel != (1, 1) or geometry.stride > 1:
        filters = weight.view(len(weight), *geometry.kernel, -1).permute(0, 3, 1, 2)
        padding, (stride, dilation) = [geometry.top, geometry.left], ([geometry.stride] * 2, [1, 1])
        # Whatever PyTorch's settings are: no timing of cuDNN's algorithms, and one whose sums have a fixed order.
        benchmark, deterministic, cudnn, tf32 = False, True, True, False
        sums = torch._convolution(
            a.permute(0, 3, 1, 2), filters, None, stride, padding, dilation, False, [0, 0], 1,
            benchmark, deterministic, cudnn, tf32,
        )  # fmt: skip
        return sums.permute(0, 2, 3, 1).contiguous().view(1, -1, len(weight))
    rows = a.reshape(-1, a.shape[3])
    if a.dtype == torch.int8:
        return torch._int_mm(rows, weight.T)[None]
    if a.dtype == torch.float8_e4m3fn:
        one = torch.ones((), device=a.device)
        return torch._scaled_mm(rows, weight.T, one, one, out_dtype=torch.float32)[None]
    if a.dtype == torch.float32 or not a.is_cuda:
        return (rows.float() @ weight.float().T)[None]
    return torch.mm(rows, weight.T, out_dtype=torch.float32)[None]
