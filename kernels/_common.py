"""What all Triton kernels share: launching, products and rounding, in the interpreter, too.

Written without `from __future__ import annotations`: Triton reads the annotations of kernels.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from vpd_fast.kernels import cubins, recording

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: runs on the CPU, for tests
# Products and sums round apart unless a kernel says `tl.fma`: else the compiler decides it anew at every place, and two
# places that must agree do not.
UNFUSED = {"enable_fp_fusion": False}


def multiprocessors(device: torch.device) -> int:
    """Number of SMs of a GPU; elsewhere that of `recording.recording`, or of an H200."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return recording.state.processors


def image_arguments(name: str, x: torch.Tensor | None, short: str | None = None) -> dict[str, Any]:
    """A tensor (B, H, W, C) and its strides `<short>_b`, `_y` and `_x`, or None; a kernel's arguments."""
    strides = (0, 0, 0) if x is None else x.stride()[:3]
    return {name: x, **{f"{short or name}_{axis}": stride for axis, stride in zip("byx", strides, strict=True)}}


def rounding_arguments(rounding: torch.Tensor | None, prefix: str = "round") -> dict[str, Any]:
    """Factors and shifts of columns by which a kernel rounds to int8, (2, N), or None; to launch `UNFUSED`."""
    factors, shifts = (None, None) if rounding is None else rounding.unbind(0)
    return {f"{prefix}_factors": factors, f"{prefix}_shifts": shifts}


def device_refuses(x: torch.Tensor, name: str = "x") -> str | None:
    """Why kernels cannot run where the tensor `name` is, or None if they can."""
    if INTERPRETED.value:
        return None
    if x.device.type != "cuda":
        return f"{name} is on {x.device}, not on a GPU"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return f"{torch.cuda.get_device_name(x.device)} is older than compute capability 8.0"
    return None


def launch(kernel: Callable[..., Any], grid: tuple[int, ...], on: torch.Tensor, **arguments: Any) -> None:
    """Runs a kernel on the device of the tensor `on`, which need not be the current one, on its current stream.

    That is the kernel that was compiled ahead of time, if there is one, or what Triton compiles now.

    arguments: the kernel's, and options of Triton; `UNFUSED` is one for kernels whose every bit matters.
    """
    if recording.state.record is not None:
        recording.state.record(kernel, grid, arguments)
        return
    table = cubins.table_for(on.device) if on.is_cuda and not INTERPRETED.value else None
    if table is not None:
        stream = torch.cuda.current_stream(on.device).cuda_stream
        if table.launch(kernel, grid, arguments, on.get_device(), stream):
            return
    with torch.cuda.device(on.device) if on.is_cuda else contextlib.nullcontext():
        kernel[grid](**{"enable_fp_fusion": True, **arguments})  # other versions of Triton have another default


@triton.jit
def dot(a, b, x):
    """x + a b, products and sums in float32, or int32 for int8; x may be None.

    The interpreter keeps bfloat16 as 16-bit integers and would multiply those, so operands are widened there. That
    changes no value: tensor cores multiply 16-bit numbers exactly, too.
    """
    if INTERPRETED and a.dtype != tl.int8:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    elif a.dtype == tl.float8e4nv:
        # Hopper's tensor cores add such products up with about 14 bits; every 128 the sum moves to a float32.
        every: tl.constexpr = a.shape[1] if a.shape[1] < 128 else 128
        return tl.dot(a, b, x, max_num_imprecise_acc=every)
    dtype: tl.constexpr = tl.int32 if a.dtype == tl.int8 else tl.float32  # Triton 3.6 does not find it out itself
    return tl.dot(a, b, x, input_precision="ieee", out_dtype=dtype)


@triton.jit
def to_int8(x):
    """float32 to int8: to nearest, ties to even, within -128 ... 127; NaN is -128."""
    x = tl.minimum(tl.maximum(tl.where(x == x, x, -128.0), -128.0), 127.0)
    return ((x + 12582912.0) - 12582912.0).to(tl.int8)  # 1.5 * 2^23


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x in another type, to nearest; for float8e4nv it must be at most 448.

    Triton's interpreter cuts bfloat16 off, so it gets the bits, and rounds float8e4nv wrongly, so it gets numbers that
    need no rounding.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    if INTERPRETED and dtype == tl.float8e4nv:
        bits = x.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        small = (x + 24576.0) - 24576.0  # 1.5 * 2^14: multiples of the smallest number, 2^-9
        x = tl.where(tl.abs(x) < 0.015625, small, normal)
    return x.to(dtype)
