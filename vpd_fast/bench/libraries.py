"""Products and convolutions of PyTorch's libraries, beside which ours are measured: oneDNN, cuBLASLt and cuDNN.

They get inputs that are joined, activated and, for 8 bits, rounded already; 8-bit products on GPUs are without scales
and bias (int8) or with one scale (fp8): their time is that of the product alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast import _native

NAMES = {"cpu": ("onednn", "onednn"), "cuda": ("cublas", "cudnn")}  # of what makes products, and convolutions
# Weights of our operators, on CPUs and on GPUs.
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
GPU_PRECISIONS = PRECISIONS | {"float16": torch.float16, "fp8": torch.float8_e4m3fn}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
# Relative to float64, of our kernels: a few roundings in float32, and both factors rounded to 16 or 8 bits. Rounding to
# fp8 (e4m3) errs by at most 2^-4, evenly distributed by 2^-4 / sqrt(3), so two factors by 5.1e-2.
MOST_ERROR = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3, "int8": 4e-2, "fp8": 5.2e-2}


def require_parity(actual: Tensor, exact: Tensor, precision: str) -> None:
    """No time is reported unless what is compared is as near to float64 as the precision allows."""
    error = ((actual.double() - exact).norm() / exact.norm()).item()
    assert error <= MOST_ERROR[precision], f"error {error:.1e}, allowed are {MOST_ERROR[precision]:.1e}"


def activations(precision: str) -> torch.dtype:
    """Dtype of the inputs of our operators beside a weight of that precision, as in an engine."""
    return DTYPES.get(precision, torch.bfloat16)


def emulates_bfloat16(device: str) -> bool:
    """Whether the device is a CPU without instructions for bfloat16."""
    return device == "cpu" and "avx512_bf16" not in _native.load("_C").usable_isas()


def _result() -> tuple:
    """Scale and zero of oneDNN's result, its dtype, nothing fused.

    float32 where bfloat16 is emulated: there oneDNN would take over a hundred times as long for its rounding.
    """
    return 1.0, 0, torch.float32 if emulates_bfloat16("cpu") else torch.bfloat16, "none", [], ""


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(whole numbers in int8, float32 scales), one scale for each row of the weight."""
    scales = weight.abs().flatten(1).amax(1) / 127
    return (weight / scales.view(-1, *[1] * (weight.dim() - 1))).round().to(torch.int8), scales


def linear(rows: int, matrix: Tensor, bias: Tensor, precision: str) -> Callable[[], Tensor]:
    """The product of random rows of that precision with a matrix (N, K), on the device of the matrix.

    precision: "float32", "bfloat16", "float16", "int8" or, on a GPU, "fp8", or their short names. Raises
    NotImplementedError for others.
    """
    k, device = matrix.shape[1], matrix.device
    if precision in DTYPES:
        dtype = DTYPES[precision]
        a, b, c = torch.randn(rows, k, device=device).to(dtype), matrix.to(dtype), bias.to(dtype)
        return lambda: F.linear(a, b, c)
    if precision == "int8" and matrix.is_cuda:
        a, b = torch.randint(-128, 128, (rows, k), dtype=torch.int8, device=device), _rounded(matrix)[0].t()
        return lambda: torch.ops.aten._int_mm(a, b)
    if precision == "int8":
        numbers, (whole, scales) = torch.randint(0, 256, (rows, k), dtype=torch.uint8), _rounded(matrix)
        packed = torch.ops.onednn.qlinear_prepack(whole, list(numbers.shape))
        result, zeros = _result(), torch.zeros(len(bias), dtype=torch.int64)
        return lambda: torch.ops.onednn.qlinear_pointwise(numbers, 0.01, 128, packed, scales, zeros, bias, *result)
    if precision == "fp8" and matrix.is_cuda:
        a, b = (x.to(torch.float8_e4m3fn) for x in (torch.randn(rows, k, device=device), matrix))
        one = torch.ones((), device=device)
        options = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16, "use_fast_accum": True}
        return lambda: torch.ops.aten._scaled_mm(a, b.t(), **options)
    raise NotImplementedError(f"there is no product of {precision} on {device.type}")


def conv2d(x: Tensor, kernel: Tensor, bias: Tensor, stride: int, precision: str) -> Callable[[], Tensor]:
    """The convolution of x (B, C, H, W) with a pixel of padding, channels-last, on its device.

    8 bits: of random numbers of its shape on a CPU; in bfloat16 on a GPU, where PyTorch has no 8-bit convolution.
    """
    if precision != "int8" or x.is_cuda:
        dtype = activations(precision)
        images, packed = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, kernel))
        offset = bias.to(dtype)
        return lambda: F.conv2d(images, packed, offset, stride=stride, padding=1)
    ones, strides = [1, 1], [stride, stride]
    numbers = torch.randint(0, 256, x.shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    whole, scales = _rounded(kernel)
    packed = torch.ops.onednn.qconv_prepack(whole, scales, 0.01, 128, strides, ones, ones, 1, list(x.shape))
    how = (torch.zeros(len(bias), dtype=torch.int32), bias, strides, ones, ones, 1, *_result())
    return lambda: torch.ops.onednn.qconv_pointwise(numbers, 0.01, 128, packed, scales, *how)
