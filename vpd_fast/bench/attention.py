"""Attention as users of PyTorch write it, beside which our operators are measured, and how far all must agree."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vpd_fast.bench.suites import Variants


def by_heads(x: Tensor, heads: int) -> Tensor:
    """(B,L,heads*D) -> (B,heads,L,D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def eager(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The result (B,L,heads*D), and the probabilities (B,heads,L,keys)."""
    q, k, v = (by_heads(x, heads) for x in (q, k, v))
    p = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
    return (p @ v).transpose(1, 2).flatten(2), p


def eager_with_maps(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The result, and the probabilities averaged over the heads, in float32."""
    out, p = eager(q, k, v, heads)
    return out, p.float().mean(1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """The result by scaled_dot_product_attention."""
    q, k, v = (by_heads(x, heads) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def sdpa_and_maps(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The result by scaled_dot_product_attention, and a second pass for the maps."""
    scores = by_heads(q, heads) @ by_heads(k, heads).transpose(-2, -1) * (q.shape[-1] // heads) ** -0.5
    return sdpa(q, k, v, heads), torch.softmax(scores, dim=-1).float().mean(1)


def require_parity(variants: Variants, q: Tensor, k: Tensor, v: Tensor, heads: int, others: Iterable[str]) -> None:
    """No time is reported unless results are within twice eager's error to float64, plus one rounding of the dtype.

    A variant returns the result, or a tuple of it and the maps. others: variants that have not promised that budget,
    but 1e-2.
    """
    rows = slice(0, 256)
    exact = eager_with_maps(q[:1, rows].double(), k.double(), v.double(), heads)

    def errors(results: Tensor | tuple[Tensor, ...]) -> list[float]:
        found = results if isinstance(results, tuple) else (results,)
        return [((x[:1, rows].double() - e).norm() / e.norm()).item() for x, e in zip(found, exact, strict=False)]

    eagerly = errors(eager_with_maps(q[:1, rows], k, v, heads))
    units = torch.finfo(q.dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    for name, variant in variants.items():
        for error, base, unit in zip(errors(variant()), eagerly, units, strict=False):
            limit = 1e-2 if name in others else 2 * base + unit
            assert error <= limit, f"{name}: error {error:.1e}, the limit is {limit:.1e}, eager's is {base:.1e}"
