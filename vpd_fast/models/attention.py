"""Attention of the Stable Diffusion UNet: written out plainly, as in the original, or by fused operators."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpd_fast.models.attention_backends import PLAIN, attention
from vpd_fast.ops import cross_attention_maps

# What a layer is to do with its map: multiply it by the weight and add it to the sum of the layers before it, if any.
# So a mean over layers is finished with the last of them, and one layer's map at a time is in memory.
MapSum = tuple[float, "Tensor | None"]


class CrossAttention(nn.Module):
    """Multi-head attention of image tokens to a context (cross-attention) or to themselves (context=None).

    Source: CompVis latent diffusion. When asked it also returns the head-mean attention map of VPD, section 3.2.
    """

    attention_backend = PLAIN

    def __init__(self, query_dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (query_dim // heads) ** -0.5
        self.to_q = nn.Linear(query_dim, query_dim, bias=False)
        self.to_k = nn.Linear(context_dim, query_dim, bias=False)
        self.to_v = nn.Linear(context_dim, query_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(query_dim, query_dim), nn.Dropout(0.0))

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, map_sum: MapSum | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x (B,N,query_dim), context (B or 1,L,context_dim) -> (B,N,query_dim), new sum of maps (B,N,L) or None."""
        source = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(source), self.to_v(source)
        if self.attention_backend == PLAIN:
            out, maps = self._plain(q, k, v, map_sum)
        elif context is None and map_sum is None:
            out, maps = attention(self.attention_backend, q, k, v, self.heads, self.scale), None
        else:
            weight, addend = map_sum or (1.0, None)
            # map_grad: as in the plain form, who uses the finished mean decides whether gradients flow through it.
            out, maps = cross_attention_maps(
                q, k, v, self.heads, self.scale,
                map_grad=True, need_maps=map_sum is not None, weight=weight, addend=addend,
            )  # fmt: skip
        return self.to_out(out), maps

    def _plain(self, q: Tensor, k: Tensor, v: Tensor, map_sum: MapSum | None) -> tuple[Tensor, Tensor | None]:
        q, k, v = (self._split_heads(t) for t in (q, k, v))
        probabilities = torch.softmax(q @ k.transpose(-2, -1) * self.scale, dim=-1)
        out = (probabilities @ v).transpose(1, 2).flatten(2)
        if map_sum is None:
            return out, None
        weight, addend = map_sum
        maps = probabilities.mean(1)
        return out, maps * weight if addend is None else torch.add(addend, maps, alpha=weight)

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

    def forward(self, x: Tensor, context: Tensor, map_sums: Mapping[str, MapSum]) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B,N,dim), context (B or 1,L,context_dim), what to do with the maps of the kinds wanted ("cross", "self").

        Returns x and the new sums, {kind: (B,N,L or N)}.
        """
        out, self_maps = self.attn1(self.norm1(x), map_sum=map_sums.get("self"))
        x = x + out
        out, cross_maps = self.attn2(self.norm2(x), context, map_sum=map_sums.get("cross"))
        x = x + out
        x = x + self.ff(self.norm3(x))
        maps = {"self": self_maps, "cross": cross_maps}
        return x, {kind: m for kind, m in maps.items() if m is not None}
