"""oneDNN's products and convolutions through PyTorch, which the benchmarks of linear and convolutions measure beside.

They get inputs that are joined, activated and, for 8 bits, rounded already: their time is that of the product alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast import _native

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
# Relative to float64, of our kernels: a few roundings in float32, and both factors rounded to 16 or 8 bits. Rounding to
# fp8 (e4m3) errs by at most 2^-4, evenly distributed by 2^-4 / sqrt(3), so two factors by 5.1e-2.
MOST_ERROR = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3, "int8": 4e-2, "fp8": 5.2e-2}


def require_parity(actual: Tensor, exact: Tensor, precision: str) -> None:
    """No time is reported unless what is compared is as near to float64 as the precision allows."""
    error = ((actual.double() - exact).norm() / exact.norm()).item()
    assert error <= MOST_ERROR[precision], f"error {error:.1e}, allowed are {MOST_ERROR[precision]:.1e}"


def emulates_bfloat16(device: str) -> bool:
    """Whether the device is a CPU without instructions for bfloat16."""
    return device == "cpu" and "avx512_bf16" not in _native.load("_C").usable_isas()


def _result() -> tuple:
    """Scale and zero of the result, its dtype, nothing fused.

    float32 where bfloat16 is emulated: there oneDNN would take over a hundred times as long for its rounding.
    """
    return 1.0, 0, torch.float32 if emulates_bfloat16("cpu") else torch.bfloat16, "none", [], ""


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(whole numbers in int8, float32 scales), one scale for each row of the weight."""
    scales = weight.abs().flatten(1).amax(1) / 127
    return (weight / scales.view(-1, *[1] * (weight.dim() - 1))).round().to(torch.int8), scales


def linear(rows: int, matrix: Tensor, bias: Tensor, precision: str) -> Callable[[], Tensor]:
    """The product of random rows of that precision with a matrix (N, K)."""
    if precision != "int8":
        dtype = PRECISIONS[precision]
        a, b, c = torch.randn(rows, matrix.shape[1]).to(dtype), matrix.to(dtype), bias.to(dtype)
        return lambda: F.linear(a, b, c)
    numbers = torch.randint(0, 256, (rows, matrix.shape[1]), dtype=torch.uint8)
    whole, scales = rounded(matrix)
    result = _result()
    packed = torch.ops.onednn.qlinear_prepack(whole, list(numbers.shape))
    zeros = torch.zeros(len(bias), dtype=torch.int64)
    return lambda: torch.ops.onednn.qlinear_pointwise(numbers, 0.01, 128, packed, scales, zeros, bias, *result)


def conv2d(x: Tensor, kernel: Tensor, bias: Tensor, stride: int, precision: str) -> Callable[[], Tensor]:
    """The convolution of x (B, C, H, W), or in 8 bits of random numbers of its shape, with a pixel of padding."""
    if precision != "int8":
        images = x.contiguous(memory_format=torch.channels_last)
        packed = kernel.to(x).contiguous(memory_format=torch.channels_last)
        return lambda: F.conv2d(images, packed, bias.to(x), stride=stride, padding=1)
    ones, strides = [1, 1], [stride, stride]
    numbers = torch.randint(0, 256, x.shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    whole, scales = rounded(kernel)
    packed = torch.ops.onednn.qconv_prepack(whole, scales, 0.01, 128, strides, ones, ones, 1, list(x.shape))
    result = _result()
    how = (torch.zeros(len(bias), dtype=torch.int32), bias, strides, ones, ones, 1)
    return lambda: torch.ops.onednn.qconv_pointwise(numbers, 0.01, 128, packed, scales, *how, *result)
