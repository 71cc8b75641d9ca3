"""The parts that the encoder and the UNet are made of, on activations (B,H,W,C)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vpd_fast import ops
from vpd_fast.engine.layers import Conv2d, GemmLayer, Layers
from vpd_fast.engine.workspace import Workspace


def to_nhwc(x: Tensor) -> Tensor:
    """(B,C,H,W) of any strides -> contiguous (B,H,W,C)."""
    return x.permute(0, 2, 3, 1).contiguous()


def to_nchw(x: Tensor) -> Tensor:
    """(B,H,W,C) -> (B,C,H,W), channels-last in memory."""
    return x.permute(0, 3, 1, 2)


def apply_scale_shift(x: Tensor, scale_shift: Tensor) -> Tensor:
    """x * scale + shift of a GroupNorm layer (B,2,C), where no GEMM follows that could do it in its prologue."""
    scale, shift = scale_shift[:, :, None, None].unbind(1)
    return torch.addcmul(shift, x, scale, out=torch.empty_like(x))  # in float32; one launch on a GPU


def call(layer: GemmLayer, memory: Workspace, x: Tensor, norm_follows: bool = False, **options: Any) -> Tensor:
    """Returns layer(x) in memory of the workspace. norm_follows: a group norm is among the readers of the result."""
    if options.get("rounding") is not None:
        options["out_dtype"] = torch.int8
    out = memory.take(layer.shape(x), options.get("out_dtype", layer.out_dtype))
    statistics = memory.take_statistics(out, layer.parts) if norm_follows else None
    return layer(x, out=out, **options, **({} if statistics is None else {"statistics": statistics}))


def group_norm(
    layers: Layers, name: str, memory: Workspace, x: Tensor, x2: Tensor | None = None, consumer: GemmLayer | None = None
) -> dict[str, Any]:
    """Options of the layer that applies the norm; `consumer` is that layer if it may round whole images to 8 bits."""
    norm, ranges = layers.norm(name), {}
    statistics = {"statistics": memory.statistics(x), "statistics2": memory.statistics(x2)}
    options: dict[str, Any] = {key: value for key, value in statistics.items() if value is not None}
    if memory.finds_statistics and isinstance(consumer, Conv2d) and consumer.weight.dtype.itemsize == 1:
        ranges["ranges"] = x.new_empty(x.shape[0], 2, norm.groups, dtype=torch.float32)
        options |= ranges | {"silu": consumer.silu, "scale": consumer.scale}
    return {"affine": norm(x, x2, **options), **ranges}


def convolve(layers: Layers, name: str, memory: Workspace, x: Tensor) -> Tensor:
    """Run the layer of that name, a convolution that halves or doubles the image."""
    return call(layers.gemm(name), memory, x, norm_follows=True)


def res_block(layers: Layers, name: str, memory: Workspace, x: Tensor, x2: Tensor | None = None) -> Tensor:
    """Residual block of the encoder or the UNet; x2: further input channels."""
    conv1, conv2 = layers.gemm(f"{name}.conv1"), layers.gemm(f"{name}.conv2")
    norm = group_norm(layers, f"{name}.norm1", memory, x, x2, consumer=conv1)
    h = call(conv1, memory, x, x2=x2, norm_follows=True, **norm)
    shortcut = f"{name}.shortcut"
    residual = call(layers.gemm(shortcut), memory, x, x2=x2) if shortcut in layers else x
    norm = group_norm(layers, f"{name}.norm2", memory, h, consumer=conv2)
    out = call(conv2, memory, h, residual=residual, norm_follows=True, **norm)
    memory.give(h)
    if residual is not x:
        memory.give(residual)
    return out


def one_head_attention(layers: Layers, name: str, memory: Workspace, x: Tensor) -> Tensor:
    """The KL encoder's attention with merged projections (rewrites.merge_one_head_attention)."""
    h = apply_scale_shift(x, group_norm(layers, f"{name}.norm", memory, x)["affine"]).flatten(1, 2)
    out = ops.self_attention(layers.gemm(f"{name}.before")(h), h, h, heads=1, scale=x.shape[-1] ** -0.5)
    return call(layers.gemm(f"{name}.after"), memory, out.view(x.shape), residual=x, norm_follows=True)
