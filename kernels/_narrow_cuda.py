"""Convolutions that read few numbers per position, such as those of images of three channels, by a CUDA C++ kernel.

It gathers what positions read from the image itself, where other kernels copy taps of whole 16 bytes.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vpd_fast.errors import InputError
from vpd_fast.kernels import _gemm_cuda, recording
from vpd_fast.kernels._gemm import Epilogue
from vpd_fast.kernels._prologue import Geometry, Rows
from vpd_fast.kernels._statistics import partial

if TYPE_CHECKING:
    from vpd_fast.ops.conv2d import Conv2dArguments

MAX_COLUMNS = 64  # that a position reads
COLUMNS = 8  # of the result, that a thread has


def fits(call: Any) -> bool:
    """Whether the kernel computes what others cannot: a convolution of channels that are no whole 16 bytes."""
    if tuple(getattr(call, "kernel", (1, 1))) == (1, 1) or getattr(call, "upsample", False):
        return False
    few = call.columns <= MAX_COLUMNS and call.x.shape[-1] % COLUMNS != 0 and call.n % COLUMNS == 0
    dtype, out = call.data.dtype, call.out.dtype
    known = dtype in (torch.bfloat16, torch.float16) and out in (torch.float32, dtype)
    plain = call.x2 is None and not call.has_prologue and call.activation in ("", "relu")
    return few and known and plain and (call.residual is None or call.residual.dtype == out)


def forward(call: "Conv2dArguments") -> None:
    """Fills call.out of what `fits`. Last strides are 1 and vectors contiguous.

    Raises InputError for what the kernel cannot compute.
    """
    out = _gemm_cuda.aligned(call.out)
    statistics = None if call.statistics is None else (call.statistics, call.run)
    if not _filled(call, out, statistics) and statistics is not None:
        partial(out.flatten(1, 2), statistics[1], statistics[0])
    if out is not call.out:
        call.out.copy_(out)


def _filled(call: "Conv2dArguments", out: Tensor, statistics: tuple[Tensor, int] | None) -> bool:
    """Fills out, and returns whether statistics have been found on the way."""
    if recording.state.record is not None:
        return False
    residual = _gemm_cuda.aligned(call.residual)
    epilogue = Epilogue(None, None, call.bias, call.activation, residual, statistics)
    geometry = Geometry(*out.shape[1:3], (call.kernel[0], call.kernel[1]), call.stride, *call.padding[:2])
    weight = call.weight.numbers()[0].contiguous()
    product = _gemm_cuda.native_call(Rows(call.x), geometry, weight, epilogue, out)
    device, stream = call.x.get_device(), torch.cuda.current_stream(call.x.device).cuda_stream
    try:
        return product.run_narrow(_gemm_cuda.name_of(call.x.dtype), device, stream)
    except ValueError as error:
        raise InputError(f"the kernel in CUDA C++ cannot compute this convolution: {error}") from error
