"""The UNet of a fast model, one pass at t = 1, with the averaged attention maps beside its features."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vpd_fast import ops
from vpd_fast.config import VPDConfig
from vpd_fast.engine.blocks import call, convolve, group_norm, res_block
from vpd_fast.engine.layers import GemmLayer, Layers
from vpd_fast.engine.text import Projected, tokens_of
from vpd_fast.engine.workspace import Workspace
from vpd_fast.models.unet import map_weights, unet_places


class Outputs:
    """What a pass leaves: a tensor for each level, its feature and behind it the weighted sums of its attention maps.

    Each layer adds its maps to memory that is there already.
    """

    def __init__(self, config: VPDConfig, tokens: int) -> None:
        self._weights, self._heads = map_weights(config), config.backbone.num_heads
        self._tokens = tokens
        self._levels: dict[int, Tensor] = {}  # (B, H*W, channels of everything) float32
        self._started: set[tuple[int, str]] = set()  # sums of level and kind that there is something in

    def attend(
        self, kind: str, place: tuple[str, int], q: Tensor, k: Tensor, v: Tensor, rounding: Tensor | None
    ) -> Tensor:
        """Attention, with its maps added to the sum if maps of this layer are wanted; rounding: of its result."""
        weight = self._weights.get(place, {}).get(kind)
        if weight is None and (kind == "self" or rounding is not None):
            return ops.self_attention(q, k, v, self._heads, rounding=rounding)
        if weight is None:
            return ops.cross_attention_maps(q, k, v, self._heads, need_maps=False)[0]
        key = place[1], kind
        accumulate = key in self._started
        self._started.add(key)
        sums = self._sums(kind, place[1], q)
        options = {"weight": weight, "accumulate": accumulate, "rounding": rounding}
        return ops.cross_attention_maps_into(q, k, v, sums, self._heads, **options)

    def add_single_token(self, place: tuple[str, int], q: Tensor) -> None:
        """Set the cross-attention maps of one token to 1, which is the probability of an only token."""
        if "cross" in self._weights.get(place, {}):
            self._sums("cross", place[1], q).fill_(1.0)

    def feature(self, level: int, x: Tensor) -> Tensor:
        """Return (B,H,W,channels) float32 whose first channels are now x (B,H,W,C), and where the maps' sums are."""
        out = self._level(level, x.flatten(1, 2)).view(*x.shape[:3], -1)
        out[..., : x.shape[3]].copy_(x)
        return out

    def _sums(self, kind: str, level: int, x: Tensor) -> Tensor:
        """The sums of a level's maps (B,H*W,columns) in the tensor of the level. x: an activation (B,H*W,C) there."""
        first = x.shape[2]
        for other in self._kinds(level):
            columns = self._columns(other, x)
            if other == kind:
                return self._level(level, x)[..., first : first + columns]
            first += columns
        raise KeyError(kind)

    def _kinds(self, level: int) -> list[str]:
        """The kinds of maps of a level in the order of their channels."""
        return sorted({kind for (_, at), kinds in self._weights.items() if at == level for kind in kinds})

    def _columns(self, kind: str, x: Tensor) -> int:
        return self._tokens if kind == "cross" else x.shape[1]

    def _level(self, level: int, x: Tensor) -> Tensor:
        if level not in self._levels:
            channels = x.shape[2] + sum(self._columns(kind, x) for kind in self._kinds(level))
            self._levels[level] = x.new_empty(x.shape[0], x.shape[1], channels, dtype=torch.float32)
        return self._levels[level]


def run_unet(layers: Layers, config: VPDConfig, latents: Tensor, text: Projected, memory: Workspace) -> list[Tensor]:
    """Latents (B,h,w,c) -> four features (B,H,W,C) float32 in new memory, high resolution first, maps behind them."""
    outputs = Outputs(config, tokens_of(text))
    features: dict[int, Tensor] = {}
    x = call(layers.gemm("unet.conv_in"), memory, latents, norm_follows=True)
    skips = [x]
    for name, place, level, gives_feature in unet_places(config.backbone)[1:]:
        skip = skips.pop() if place == "up" else None
        for step in _steps(layers, f"unet.{name}", skip, text, outputs, (place, level)):
            last, x = x, step(layers=layers, memory=memory, x=x)
            if not any(last is kept for kept in skips):
                memory.give(last)
        if skip is not None:
            memory.give(skip)
        if place == "down":
            skips.append(x)
        if gives_feature:
            features[level] = outputs.feature(level, x)
    return [features[level] for level in sorted(features)]


def _steps(
    layers: Layers, block: str, skip: Tensor | None, text: Projected, outputs: Outputs, place: tuple[str, int]
) -> Iterator[Callable[..., Tensor]]:
    """The layers of a block of the UNet as functions, one tensor in and one out."""
    for i in itertools.count():
        name = f"{block}.{i}"
        if f"{name}.conv1" in layers:
            yield partial(res_block, name=name, x2=skip if i == 0 else None)
        elif f"{name}.proj_in" in layers:
            yield partial(_transformer, name=name, text=text, outputs=outputs, place=place)
        elif name in layers:  # resamples
            yield partial(convolve, name=name)
        else:
            break


def _transformer(
    layers: Layers, name: str, memory: Workspace, x: Tensor, text: Projected, outputs: Outputs, place: tuple[str, int]
) -> Tensor:
    t = call(layers.gemm(f"{name}.proj_in"), memory, x, **group_norm(layers, f"{name}.norm", memory, x))
    qkv = call(layers.gemm(f"{name}.attn1.qkv"), memory, t)
    q, k, v = qkv.flatten(1, 2).chunk(3, dim=-1)
    project, context = layers.linear(f"{name}.attn1.out"), text[name]
    attended = outputs.attend("self", place, q, k, v, project.input_rounding).view(x.shape)
    memory.give(qkv)
    if isinstance(context, tuple):
        t = _replaced(memory, t, call(project, memory, attended, residual=t))
        q, project = call(layers.gemm(f"{name}.attn2.q"), memory, t), layers.linear(f"{name}.attn2.out")
        attended = outputs.attend("cross", place, q.flatten(1, 2), *context, project.input_rounding)
        memory.give(q)
        t = _replaced(memory, t, call(project, memory, attended.view(x.shape), residual=t))
    else:
        t = _replaced(memory, t, _for_each_text(project, context, attended, t))
        outputs.add_single_token(place, q)
    return _feed_forward(layers, name, memory, t, x)


def _feed_forward(layers: Layers, name: str, memory: Workspace, t: Tensor, x: Tensor) -> Tensor:
    """Both layers, with the projection after them; the first may round what the second reads. Gives t back."""
    first, second = layers.gemm(f"{name}.ff1"), layers.linear(f"{name}.ff2")
    rounding, x2 = second.input_rounding, t
    options: dict[str, Any] = {}
    if rounding is not None:
        x2, width = memory.take(tuple(t.shape), torch.int8), first.shape(t)[-1]
        options = {"rounding": rounding[:, :width], "x_rounding": rounding[:, width:], "x_out": x2}
    hidden = call(first, memory, t, **options)
    out = call(second, memory, hidden, x2=x2, residual=x, norm_follows=True)
    for used in {id(used): used for used in (hidden, x2, t)}.values():
        memory.give(used)
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
