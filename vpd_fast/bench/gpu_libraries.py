"""Products and convolutions of PyTorch's libraries on a GPU, cuBLASLt and cuDNN, beside which ours are measured.

Like oneDNN on the CPU (`onednn.py`) they get inputs that are joined, activated and, for 8 bits, rounded already; 8-bit
products are without scales and bias (int8) or with one scale (fp8): their time is that of the product alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast.bench import onednn

# Of our operators on a GPU.
PRECISIONS = onednn.PRECISIONS | {"float16": torch.float16, "fp8": torch.float8_e4m3fn}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


def linear(rows: int, matrix: Tensor, bias: Tensor, precision: str) -> Callable[[], Tensor]:
    """The product of random rows of that precision with a matrix (N, K) on a GPU.

    precision: "float32", "bfloat16", "int8" or "fp8", or their short names.
    """
    k, device = matrix.shape[1], matrix.device
    if precision in DTYPES:
        dtype = DTYPES[precision]
        a, b, c = torch.randn(rows, k, device=device).to(dtype), matrix.to(dtype), bias.to(dtype)
        return lambda: F.linear(a, b, c)
    if precision == "int8":
        a = torch.randint(-128, 128, (rows, k), dtype=torch.int8, device=device)
        b = onednn.rounded(matrix)[0].t()
        return lambda: torch._int_mm(a, b)
    if precision == "fp8":
        a, b = (x.to(torch.float8_e4m3fn) for x in (torch.randn(rows, k, device=device), matrix))
        one = torch.ones((), device=device)
        options = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16, "use_fast_accum": True}
        return lambda: torch._scaled_mm(a, b.t(), **options)
    raise NotImplementedError(f"there is no product of {precision}")


def conv2d(x: Tensor, kernel: Tensor, bias: Tensor, stride: int, precision: str) -> Callable[[], Tensor]:
    """cuDNN's convolution of x (B, C, H, W) with a pixel of padding, channels-last.

    8 bits: in bfloat16, because PyTorch has no 8-bit convolution on GPUs.
    """
    dtype = DTYPES.get(precision, torch.bfloat16)
    images = x.to(dtype).contiguous(memory_format=torch.channels_last)
    packed = kernel.to(dtype).contiguous(memory_format=torch.channels_last)
    offset = bias.to(dtype)
    return lambda: F.conv2d(images, packed, offset, stride=stride, padding=1)


def activations(precision: str) -> torch.dtype:
    """Dtype of the inputs of our operators beside a weight of that precision, as in an engine."""
    dtype = PRECISIONS[precision]
    return dtype if dtype.itemsize > 1 else torch.bfloat16
