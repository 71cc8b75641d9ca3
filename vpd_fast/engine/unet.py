"""The UNet of a fast model, one pass at t = 1, with the averaged attention maps beside its features."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from vpd_fast import ops
from vpd_fast.config import VPDConfig
from vpd_fast.engine.blocks import call, convolve, group_norm, res_block
from vpd_fast.engine.layers import GemmLayer, Layers
from vpd_fast.engine.text import Projected
from vpd_fast.engine.workspace import Workspace
from vpd_fast.models.unet import map_weights, unet_places


class MapSums:
    """The weighted sums of attention maps per (level, kind); each layer adds to memory that is there already."""

    def __init__(self, config: VPDConfig) -> None:
        self._weights, self._heads = map_weights(config), config.backbone.num_heads
        self.sums: dict[tuple[int, str], Tensor] = {}

    def attend(self, kind: str, place: tuple[str, int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention, with its maps added to the sum if maps of this layer are wanted."""
        weight = self._weights.get(place, {}).get(kind)
        if weight is None and kind == "self":
            return ops.self_attention(q, k, v, self._heads)
        if weight is None:
            return ops.cross_attention_maps(q, k, v, self._heads, need_maps=False)[0]
        key = place[1], kind
        accumulate = key in self.sums
        if not accumulate:
            self.sums[key] = q.new_empty(q.shape[0], q.shape[1], k.shape[1], dtype=torch.float32)
        return ops.cross_attention_maps_into(q, k, v, self.sums[key], self._heads, weight=weight, accumulate=accumulate)

    def add_single_token(self, place: tuple[str, int], q: Tensor) -> None:
        """Set the cross-attention maps of one token to 1, which is the probability of an only token."""
        if "cross" in self._weights.get(place, {}):
            self.sums[place[1], "cross"] = q.new_ones(q.shape[0], q.shape[1], 1, dtype=torch.float32)


def run_unet(
    layers: Layers, config: VPDConfig, latents: Tensor, text: Projected, memory: Workspace
) -> tuple[list[Tensor], MapSums]:
    """Latents (B,h,w,c) -> four features (B,H,W,C), high resolution first, and the sums of maps (B,H*W,L or H*W).

    The features are in memory of the workspace.
    """
    maps = MapSums(config)
    features: dict[int, Tensor] = {}
    x = call(layers.gemm("unet.conv_in"), memory, latents, norm_follows=True)
    skips = [x]
    for name, place, level, gives_feature in unet_places(config.backbone)[1:]:
        skip = skips.pop() if place == "up" else None
        for step in _steps(layers, f"unet.{name}", skip, text, maps, (place, level)):
            last, x = x, step(layers=layers, memory=memory, x=x)
            if not any(last is kept for kept in (*skips, *features.values())):
                memory.give(last)
        if skip is not None:
            memory.give(skip)
        if place == "down":
            skips.append(x)
        if gives_feature:
            features[level] = x
    return [features[level] for level in sorted(features)], maps


def _steps(
    layers: Layers, block: str, skip: Tensor | None, text: Projected, maps: MapSums, place: tuple[str, int]
) -> Iterator[Callable[..., Tensor]]:
    """The layers of a block of the UNet as functions, one tensor in and one out."""
    for i in itertools.count():
        name = f"{block}.{i}"
        if f"{name}.conv1" in layers:
            yield partial(res_block, name=name, x2=skip if i == 0 else None)
        elif f"{name}.proj_in" in layers:
            yield partial(_transformer, name=name, text=text, maps=maps, place=place)
        elif name in layers:  # resamples
            yield partial(convolve, name=name)
        else:
            break


def _transformer(
    layers: Layers, name: str, memory: Workspace, x: Tensor, text: Projected, maps: MapSums, place: tuple[str, int]
) -> Tensor:
    t = call(layers.gemm(f"{name}.proj_in"), memory, x, **group_norm(layers, f"{name}.norm", memory, x))
    qkv = call(layers.gemm(f"{name}.attn1.qkv"), memory, t)
    q, k, v = qkv.flatten(1, 2).chunk(3, dim=-1)
    attended, context = maps.attend("self", place, q, k, v).view(x.shape), text[name]
    memory.give(qkv)
    if isinstance(context, tuple):
        t = _replaced(memory, t, call(layers.gemm(f"{name}.attn1.out"), memory, attended, residual=t))
        q = call(layers.gemm(f"{name}.attn2.q"), memory, t)
        attended = maps.attend("cross", place, q.flatten(1, 2), *context)
        memory.give(q)
        t = _replaced(memory, t, call(layers.gemm(f"{name}.attn2.out"), memory, attended.view(x.shape), residual=t))
    else:
        t = _replaced(memory, t, _for_each_text(layers.gemm(f"{name}.attn1.out"), context, attended, t))
        maps.add_single_token(place, q)
    hidden = call(layers.gemm(f"{name}.ff1"), memory, t)
    out = call(layers.gemm(f"{name}.ff2"), memory, hidden, x2=t, residual=x, norm_follows=True)
    memory.give(hidden)
    memory.give(t)
    return out


def _replaced(memory: Workspace, old: Tensor, new: Tensor) -> Tensor:
    memory.give(old)
    return new


def _for_each_text(out: GemmLayer, biases: Tensor, attended: Tensor, t: Tensor) -> Tensor:
    """Output projection of self-attention with that of cross-attention in its bias: one for all images, or one each."""
    if len(biases) == 1:
        return out(attended, residual=t, bias=biases[0])
    images = zip(biases, attended.split(1), t.split(1), strict=True)
    return torch.cat([out(a, residual=residual, bias=bias) for bias, a, residual in images])
