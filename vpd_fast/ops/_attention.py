"""Implementations of attention with maps, forward: each computes one `Problem` into memory that it is given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vpd_fast import _native
from vpd_fast.ops._attention_checks import maps_dtype
from vpd_fast.ops._categories import Categories
from vpd_fast.ops._dispatch import never_refuses
from vpd_fast.ops.availability import triton_missing


@dataclass(frozen=True)
class Problem:
    """The checked arguments of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    addend: Tensor | None
    categories: Categories | None
    heads: int
    scale: float
    weight: float
    average_heads: bool

    def for_kernels(self) -> dict[str, Any]:
        """The arguments that kernels take by name."""
        names = ("heads", "scale", "weight", "categories", "average_heads")
        return {name: getattr(self, name) for name in names}


# Each implementation fills out (B, N, heads * D), contiguous, and maps, unless they are None, of any strides.
Run = Callable[[Problem, Tensor, "Tensor | None"], None]


def split_heads(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """(B, N, heads * D) -> (B, heads, N, D)."""
    return x.to(dtype).unflatten(-1, (heads, -1)).transpose(1, 2)


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for that kind of device; some kinds ("meta") know no autocast."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """The caller's tensors have been cast already; what an implementation computes must not be."""
    return torch.autocast(device.type, enabled=False) if autocast_enabled(device) else contextlib.nullcontext()


def _reference(p: Problem, out: Tensor, maps: Tensor | None) -> None:
    q, k, v = (split_heads(x, p.heads, maps_dtype(p.q)) for x in (p.q, p.k, p.v))
    probabilities = torch.softmax(q @ k.transpose(-2, -1) * p.scale, dim=-1)
    out.copy_((probabilities @ v).transpose(1, 2).flatten(2))
    if maps is not None:
        _write_maps(p, probabilities.mean(1) if p.average_heads else probabilities, maps)


def _write_maps(p: Problem, token_maps: Tensor, maps: Tensor) -> None:
    if p.categories is not None:
        token_maps = token_maps @ p.categories.matrix(token_maps.dtype)
    token_maps = token_maps * p.weight
    maps.copy_(token_maps if p.addend is None else p.addend + token_maps)


def _constant(p: Problem, out: Tensor, maps: Tensor | None) -> None:
    """One token has all the attention whatever the query is."""
    out.copy_(p.v.expand(out.shape))
    if maps is not None:
        _write_maps(p, torch.ones((1,) * maps.dim(), dtype=maps_dtype(p.q), device=p.q.device), maps)


def _constant_refuses(q: Tensor, k: Tensor, v: Tensor, heads: int) -> str | None:
    return None if k.shape[1] == 1 else f"there are {k.shape[1]} tokens, not one"


def last_contiguous(x: Tensor) -> Tensor:
    """x, copied if its last dimension is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def image_and_row_strides(x: Tensor) -> tuple[int, int]:
    """Strides of (B, N, heads * D) in elements; 0 where there is one image or row: PyTorch's may be anything there."""
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0


def address_and_strides(maps: Tensor | None) -> tuple[int, tuple[int, ...]] | None:
    """Of (B, N, M), seen as (B, 1, N, M), or (B, heads, N, M)."""
    if maps is None:
        return None
    if maps.dim() == 4:
        return maps.data_ptr(), maps.stride()
    batch, row, column = maps.stride()
    return maps.data_ptr(), (batch, 0, row, column)


def cpu_refuses(q: Tensor, k: Tensor, v: Tensor, heads: int) -> str | None:
    if q.device.type != "cpu":
        return f"q is on {q.device}, not on the CPU"
    if q.dtype == torch.float64:
        return "q is float64"
    return _native.why_missing("_C")


def _cpu(p: Problem, out: Tensor, maps: Tensor | None) -> None:
    # There are no float16 kernels: they would be float32 ones with conversions.
    dtype = torch.float32 if p.q.dtype == torch.float16 else p.q.dtype
    q, k, v = (last_contiguous(x).to(dtype) for x in (p.q, p.k, p.v))
    result = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
    # Maps of 16 bits are written as float32 first: few places ask for them, and only once for each level.
    target = maps if maps is None or maps.dtype == torch.float32 else torch.empty(maps.shape)
    _native.load("_C").cross_attention_maps(
        (q.data_ptr(), k.data_ptr(), v.data_ptr(), result.data_ptr()),
        _dtype_name(q),
        _shape(q, k, p.heads),
        tuple(image_and_row_strides(x) for x in (q, k, v)),
        address_and_strides(target),
        address_and_strides(p.addend),
        None if p.categories is None else (p.categories.ids.data_ptr(), p.categories.weights.data_ptr()),
        target.shape[-1] if target is not None else 0,
        p.average_heads,
        p.scale,
        p.weight,
        torch.get_num_threads(),
        _native.isa(),
    )
    if result is not out:
        out.copy_(result)
    if target is not maps:
        maps.copy_(target)


def triton_refuses(q: Tensor, k: Tensor, v: Tensor, heads: int) -> str | None:
    """Why the Triton kernels of attention cannot run here, or None."""
    if q.dtype == torch.float64:
        return "q is float64"
    reason = triton_missing(q, "q")
    if reason is not None:
        return reason
    from vpd_fast.kernels import cross_attention_maps as kernels

    return kernels.refuse(q, k, v, heads)


def _triton(p: Problem, out: Tensor, maps: Tensor | None) -> None:
    from vpd_fast.kernels import cross_attention_maps as kernels

    kernels.forward(*(last_contiguous(x) for x in (p.q, p.k, p.v)), out, maps, p.addend, **p.for_kernels())


CUDA_DTYPES = (torch.bfloat16, torch.float16)
CUDA_SCHEDULE = "auto"  # or "heads_loop", "cluster", "split", see csrc/cuda/cross_attention_maps.h


def _shape(q: Tensor, k: Tensor, heads: int) -> tuple[int, ...]:
    return (*q.shape[:2], k.shape[1], heads, q.shape[2] // heads)


def _dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _cuda_refuses(q: Tensor, k: Tensor, v: Tensor, heads: int) -> str | None:
    if q.device.type != "cuda":
        return f"q is on {q.device}, not on a GPU"
    if q.dtype not in CUDA_DTYPES:
        return f"q is {q.dtype}, not of 16 bits"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"{torch.cuda.get_device_name(q.device)} is older than compute capability 8.0"
    missing = _native.why_missing("_C_cuda")
    if missing is not None:
        return missing
    for name, x in (("q", q), ("k", k), ("v", v)):
        # Tensors that are not laid out in rows are copied, and then they are aligned.
        if x.stride(-1) == 1 and (x.data_ptr() % 16 or any(step % 8 for step in image_and_row_strides(x))):
            return f"{name} has rows that are not aligned to 16 bytes"
    if q.numel():
        try:
            _cuda_scratch(q, k, heads, True, True)
        except ValueError as reason:
            return str(reason)
    return None


def _cuda_scratch(q: Tensor, k: Tensor, heads: int, need_maps: bool, average_heads: bool) -> int:
    """Bytes. Raises ValueError with the reason if the kernel does not take such sizes."""
    return _native.load("_C_cuda").cross_attention_maps_scratch(
        _dtype_name(q), _shape(q, k, heads), need_maps, average_heads, CUDA_SCHEDULE, q.device.index
    )


def _cuda(p: Problem, out: Tensor, maps: Tensor | None) -> None:
    q, k, v = (last_contiguous(x) for x in (p.q, p.k, p.v))
    size = _cuda_scratch(q, k, p.heads, maps is not None, p.average_heads)
    scratch = q.new_empty(size, dtype=torch.uint8)
    place = address_and_strides(maps)
    categories = None
    if p.categories is not None:
        tensors = (p.categories.tokens, p.categories.offsets, p.categories.weights)
        categories = (*(x.data_ptr() for x in tensors), p.categories.count)
    _native.load("_C_cuda").cross_attention_maps(
        tuple(x.data_ptr() for x in (q, k, v, out)),
        _dtype_name(q),
        _shape(q, k, p.heads),
        tuple(image_and_row_strides(x) for x in (q, k, v)),
        None if place is None else (place[0], _dtype_name(maps), place[1]),
        address_and_strides(p.addend),
        categories,
        p.average_heads,
        p.scale,
        p.weight,
        CUDA_SCHEDULE,
        scratch.data_ptr() if size else 0,
        q.device.index,
        torch.cuda.current_stream(q.device).cuda_stream,
    )


# (name, run, refuse), in order of preference.
IMPLEMENTATIONS: tuple[tuple[str, Run, Callable[..., str | None]], ...] = (
    ("constant", _constant, _constant_refuses),
    ("cuda", _cuda, _cuda_refuses),
    ("cpu", _cpu, cpu_refuses),
    ("triton", _triton, triton_refuses),
    ("reference", _reference, never_refuses),
)


def solve_problem(run: Run, p: Problem, out: Tensor, maps: Tensor | None) -> None:
    """Runs one implementation, unless there is nothing to compute."""
    if out.numel():
        with no_autocast(out.device):
            run(p, out, maps)
