"""The parts that the encoder and the UNet are made of, on activations (B,H,W,C)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vpd_fast import ops
from vpd_fast.engine.layers import Layer

Layers = Mapping[str, Layer]


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


def res_block(layers: Layers, name: str, x: Tensor, x2: Tensor | None = None) -> Tensor:
    """Residual block of the encoder or the UNet; x2: further input channels."""
    h = layers[f"{name}.conv1"](x, x2=x2, affine=layers[f"{name}.norm1"](x, x2))
    shortcut = layers.get(f"{name}.shortcut")
    residual = x if shortcut is None else shortcut(x, x2=x2)
    return layers[f"{name}.conv2"](h, affine=layers[f"{name}.norm2"](h), residual=residual)


def one_head_attention(layers: Layers, name: str, x: Tensor) -> Tensor:
    """The KL encoder's attention with merged projections (rewrites.merge_one_head_attention)."""
    h = normalised(x, layers[f"{name}.norm"](x)).flatten(1, 2)
    out = ops.self_attention(layers[f"{name}.before"](h), h, h, heads=1, scale=x.shape[-1] ** -0.5)
    return layers[f"{name}.after"](out.view(x.shape), residual=x)
