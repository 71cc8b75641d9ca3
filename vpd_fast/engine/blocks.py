"""The parts that the encoder and the UNet are made of, on activations (B,H,W,C)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vpd_fast import ops
from vpd_fast.engine.layers import Product
from vpd_fast.engine.workspace import Workspace

Layers = Mapping[str, Any]  # of vpd_fast.engine.layers, by name


def to_nhwc(x: Tensor) -> Tensor:
    """(B,C,H,W) of any strides -> contiguous (B,H,W,C)."""
    return x.permute(0, 2, 3, 1).contiguous()


def to_nchw(x: Tensor) -> Tensor:
    """(B,H,W,C) -> (B,C,H,W), channels-last in memory."""
    return x.permute(0, 3, 1, 2)


def normalised(x: Tensor, affine: Tensor) -> Tensor:
    """x times scale plus shift of a GroupNorm layer, where no product follows that could do it on the way."""
    scale, shift = affine[:, :, None, None].unbind(1)
    return torch.addcmul(shift, x.float(), scale).to(x.dtype)


def call(layer: Product, memory: Workspace, x: Tensor, **options: Tensor | None) -> Tensor:
    """layer(x) in memory of the workspace."""
    return layer(x, out=memory.take(layer.shape(x), layer.out_dtype), **options)


def convolve(layers: Layers, name: str, memory: Workspace, x: Tensor) -> Tensor:
    """The layer of that name alone."""
    return call(layers[name], memory, x)


def res_block(layers: Layers, name: str, memory: Workspace, x: Tensor, x2: Tensor | None = None) -> Tensor:
    """Residual block of the encoder or the UNet; x2: further input channels."""
    affine = layers[f"{name}.norm1"](x, x2)
    h = call(layers[f"{name}.conv1"], memory, x, x2=x2, affine=affine)
    shortcut = layers.get(f"{name}.shortcut")
    residual = x if shortcut is None else call(shortcut, memory, x, x2=x2)
    affine = layers[f"{name}.norm2"](h)
    out = call(layers[f"{name}.conv2"], memory, h, affine=affine, residual=residual)
    memory.give(h)
    if shortcut is not None:
        memory.give(residual)
    return out


def one_head_attention(layers: Layers, name: str, memory: Workspace, x: Tensor) -> Tensor:
    """The KL encoder's attention with merged projections (rewrites.merge_one_head_attention)."""
    h = normalised(x, layers[f"{name}.norm"](x)).flatten(1, 2)
    out = ops.self_attention(layers[f"{name}.before"](h), h, h, heads=1, scale=x.shape[-1] ** -0.5)
    return call(layers[f"{name}.after"], memory, out.view(x.shape), residual=x)
