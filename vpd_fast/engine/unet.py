"""The UNet of a fast model, one pass at t = 1, with the averaged attention maps beside its features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vpd_fast import ops
from vpd_fast.engine.blocks import Layers, res_block
from vpd_fast.engine.layers import Linear
from vpd_fast.engine.text import Projected
from vpd_fast.models.unet import UNetWrapper


@dataclass(frozen=True)
class Structure:
    """Which blocks the UNet has, where features are taken, and whose maps are averaged; from the plain model."""

    blocks: tuple[tuple[str, str, int], ...]  # name, place ("down", "mid", "up"), level
    taps: Mapping[str, int]  # name of the block after which a feature is taken: level
    map_weights: Mapping[tuple[str, int], Mapping[str, float]]  # (place, level): {kind: weight}
    heads: int

    @classmethod
    def of(cls, wrapper: UNetWrapper, heads: int) -> Structure:
        """The structure of a plain UNet, which may be on the meta device."""
        unet = wrapper.unet.diffusion_model
        blocks = [(f"unet.input_blocks.{i}", "down", level) for i, level in enumerate(unet.input_levels)]
        blocks.append(("unet.middle_block", "mid", unet.input_levels[-1]))
        blocks += [(f"unet.output_blocks.{i}", "up", level) for i, level in enumerate(unet.output_levels)]
        taps = {f"unet.output_blocks.{i}": level for i, level in unet.taps.items()}
        return cls(tuple(blocks), taps, wrapper.map_weights, heads)


class MapSums:
    """The weighted sums of attention maps per (level, kind); each layer adds to memory that is there already."""

    def __init__(self, structure: Structure) -> None:
        self._weights = structure.map_weights
        self.sums: dict[tuple[int, str], Tensor] = {}

    def attend(self, kind: str, place: tuple[str, int], q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor | None:
        """Attention with its maps added to the sum, or None if nobody wants maps of this layer."""
        weight = self._weights.get(place, {}).get(kind)
        if weight is None:
            return None
        key = place[1], kind
        known = key in self.sums
        if not known:
            self.sums[key] = q.new_empty(q.shape[0], q.shape[1], k.shape[1], dtype=torch.float32)
        return ops.cross_attention_maps_into(q, k, v, self.sums[key], heads, weight=weight, accumulate=known)

    def add_single_token(self, place: tuple[str, int], q: Tensor) -> None:
        """The probability of the only token is 1, and so is its mean over layers."""
        if "cross" in self._weights.get(place, {}):
            self.sums[place[1], "cross"] = q.new_ones(q.shape[0], q.shape[1], 1, dtype=torch.float32)


def run_unet(layers: Layers, structure: Structure, latents: Tensor, text: Projected) -> tuple[list[Tensor], MapSums]:
    """Latents (B,h,w,c) -> four features (B,H,W,C), high resolution first, and the sums of maps (B,H*W,L or H*W)."""
    maps = MapSums(structure)
    features: dict[int, Tensor] = {}
    skips: list[Tensor] = []
    x = layers["unet.conv_in"](latents)
    skips.append(x)
    for name, place, level in structure.blocks[1:]:
        skip = skips.pop() if place == "up" else None
        if f"{name}.0.conv1" in layers:
            x = res_block(layers, f"{name}.0", x, skip)
            if f"{name}.1.proj_in" in layers:
                x = _transformer(layers, f"{name}.1", x, text, maps, (place, level), structure.heads)
            if place == "mid":
                x = res_block(layers, f"{name}.2", x)
            for i in (1, 2):  # what upsamples is the last of a block
                if f"{name}.{i}" in layers:
                    x = layers[f"{name}.{i}"](x)
        else:
            x = layers[f"{name}.0"](x)  # downsamples
        if place == "down":
            skips.append(x)
        if name in structure.taps:
            features[structure.taps[name]] = x
    return [features[level] for level in sorted(features)], maps


def _transformer(
    layers: Layers, name: str, x: Tensor, text: Projected, maps: MapSums, place: tuple[str, int], heads: int
) -> Tensor:
    t = layers[f"{name}.proj_in"](x, affine=layers[f"{name}.norm"](x)).flatten(1, 2)
    q, k, v = layers[f"{name}.attn1.qkv"](t).chunk(3, dim=-1)
    attended = maps.attend("self", place, q, k, v, heads)
    if attended is None:
        attended = ops.self_attention(q, k, v, heads)
    known = text[name]
    if isinstance(known, tuple):
        t = layers[f"{name}.attn1.out"](attended, residual=t)
        q = layers[f"{name}.attn2.q"](t)
        attended = maps.attend("cross", place, q, *known, heads)
        if attended is None:
            attended, _ = ops.cross_attention_maps(q, *known, heads, need_maps=False)
        t = layers[f"{name}.attn2.out"](attended, residual=t)
    else:
        t = _for_each_text(known, attended, t)
        maps.add_single_token(place, q)
    hidden = layers[f"{name}.ff1"](t)
    return layers[f"{name}.ff2"](hidden.view(*x.shape[:3], -1), x2=t.view(x.shape), residual=x)


def _for_each_text(outs: list[Linear], attended: Tensor, t: Tensor) -> Tensor:
    """The output of self-attention, which has that of cross-attention in its bias: one for all images, or one each."""
    if len(outs) == 1:
        return outs[0](attended, residual=t)
    images = zip(outs, attended.split(1), t.split(1), strict=True)
    return torch.cat([out(a, residual=residual) for out, a, residual in images])
