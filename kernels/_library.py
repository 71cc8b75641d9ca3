"""The sums of a product by the libraries of PyTorch, where those are faster: cuBLAS, and cuDNN for convolutions.

They leave sums of float32 or int32, and cuDNN of bfloat16 or float16, to which `_gemm.py` then applies its epilogue.
"""

import torch
import torch.nn.functional as F

from vpd_fast.kernels._prologue import Geometry

ALIGNED = {torch.int8: 8, torch.float8_e4m3fn: 16}  # of which n and k must be multiples
MIN_ROWS = 17  # of _int_mm


def library_refuses(a: torch.Tensor, a2: torch.Tensor | None, geometry: Geometry, weight: torch.Tensor) -> str | None:
    """Why a library cannot compute the sums, or None; arguments as for `_gemm.gemm`."""
    n, k = weight.shape
    if a2 is not None:
        return "two sources"
    if geometry.kernel != (1, 1) or geometry.stride > 1:
        if a.dtype not in (torch.bfloat16, torch.float16):
            return f"convolution of {a.dtype}"
        return None if _is_convolution(a, geometry) else "padding that is not symmetric"
    if any(size % ALIGNED.get(a.dtype, 1) for size in (n, k)):
        return f"{n}x{k} numbers that are not aligned"
    if a.dtype == torch.int8 and a.shape[0] * geometry.out_height * geometry.out_width < MIN_ROWS:
        return "few rows"
    return None if _is_matrix(a, geometry) else "padding, or rows that are not evenly spaced"


def _is_matrix(a: torch.Tensor, geometry: Geometry) -> bool:
    whole = (geometry.out_height, geometry.out_width) == a.shape[1:3] and not geometry.top and not geometry.left
    return whole and a.is_contiguous()


def _is_convolution(a: torch.Tensor, geometry: Geometry) -> bool:
    """Whether padding of `top` and `left` on both sides gives a result of this size."""
    padding, result = (geometry.top, geometry.left), (geometry.out_height, geometry.out_width)
    sides = zip(a.shape[1:3], geometry.kernel, padding, result, strict=True)
    return all((size + 2 * pad - kernel) // geometry.stride + 1 == out for size, kernel, pad, out in sides)


def library_sums(a: torch.Tensor, a2: torch.Tensor | None, geometry: Geometry, weight: torch.Tensor) -> torch.Tensor:
    """a times weight, (1, rows, n), neither scaled nor activated. Raises NotImplementedError for what it refuses."""
    reason = library_refuses(a, a2, geometry, weight)
    if reason is not None:
        raise NotImplementedError(reason)
    if geometry.kernel != (1, 1) or geometry.stride > 1:
        filters = weight.view(len(weight), *geometry.kernel, -1).permute(0, 3, 1, 2)
        padding = (geometry.top, geometry.left)
        sums = F.conv2d(a.permute(0, 3, 1, 2), filters, stride=geometry.stride, padding=padding)
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
