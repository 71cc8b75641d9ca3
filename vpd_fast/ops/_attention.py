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


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """The caller's tensors have been cast already; what an implementation computes must not be."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else contextlib.nullcontext()


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
    """Strides of (B, N, heads * D) in elements; 0 for an only image."""
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)


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
        str(dtype).removeprefix("torch."),
        (*q.shape[:2], k.shape[1], p.heads, q.shape[2] // p.heads),
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


IMPLEMENTATIONS: tuple[tuple[str, Run, Callable[..., str | None]], ...] = (
    ("constant", _constant, _constant_refuses),
    ("cpu", _cpu, cpu_refuses),
    ("reference", _reference, lambda *_: None),
)


def solve_problem(run: Run, p: Problem, out: Tensor, maps: Tensor | None) -> None:
    """Runs one implementation, unless there is nothing to compute."""
    if out.numel():
        with no_autocast(out.device):
            run(p, out, maps)
