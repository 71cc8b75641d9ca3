"""Attention of the Stable Diffusion UNet, written out plainly: probabilities are materialised as in the original."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CrossAttention(nn.Module):
    """Multi-head attention of image tokens to a context (cross-attention) or to themselves (context=None).

    Source: CompVis latent diffusion. With `need_map` it also returns the head-mean attention map of VPD, section 3.2.
    """

    def __init__(self, query_dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (query_dim // heads) ** -0.5
        self.to_q = nn.Linear(query_dim, query_dim, bias=False)
        self.to_k = nn.Linear(context_dim, query_dim, bias=False)
        self.to_v = nn.Linear(context_dim, query_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(query_dim, query_dim), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None, need_map: bool = False) -> tuple[Tensor, Tensor | None]:
        """x (B,N,query_dim), context (B,L,context_dim) -> (B,N,query_dim), head-mean probabilities (B,N,L) or None."""
        context = x if context is None else context
        q, k, v = (self._split_heads(t) for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
        probabilities = torch.softmax(q @ k.transpose(-2, -1) * self.scale, dim=-1)
        out = (probabilities @ v).transpose(1, 2).flatten(2)
        return self.to_out(out), probabilities.mean(1) if need_map else None

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class GEGLU(nn.Module):
    """Linear to twice the width, one half gated by the GELU of the other (Shazeer 2020)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden_dim * 2)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., hidden_dim)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU of four times the width, then a linear layer back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, dim * 4), nn.Dropout(0.0), nn.Linear(dim * 4, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each with a pre-norm and a residual."""

    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, heads)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, context: Tensor, map_kinds: frozenset[str] = frozenset()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B,N,dim), context (B,L,context_dim), map_kinds out of {"cross", "self"} -> x, {kind: (B,N,L or N)}."""
        out, self_map = self.attn1(self.norm1(x), need_map="self" in map_kinds)
        x = x + out
        out, cross_map = self.attn2(self.norm2(x), context, need_map="cross" in map_kinds)
        x = x + out
        x = x + self.ff(self.norm3(x))
        maps = {"self": self_map, "cross": cross_map}
        return x, {kind: m for kind, m in maps.items() if m is not None}
