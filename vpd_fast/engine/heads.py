"""The heads of a fast model: features (B,H,W,C), high resolution first -> what the plain head returns, NHWC."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast.engine.blocks import apply_scale_shift, to_nchw, to_nhwc
from vpd_fast.engine.layers import Layers


def _resized(x: Tensor, size: torch.Size | tuple[int, ...], mode: str, **options: bool) -> Tensor:
    return x if x.shape[1:3] == size else to_nhwc(F.interpolate(to_nchw(x), size=tuple(size), mode=mode, **options))


def segmentation(layers: Layers, features: list[Tensor]) -> Tensor:
    """Logits (B,h,w,num_classes) at the highest resolution."""
    laterals = [layers.gemm(f"head.lateral.{i}")(x) for i, x in enumerate(features)]
    for i in range(len(laterals) - 1, 0, -1):
        laterals[i - 1] = laterals[i - 1] + _resized(laterals[i], laterals[i - 1].shape[1:3], "nearest")
    pyramid = [layers.gemm(f"head.fpn.{i}")(x) for i, x in enumerate(laterals)]
    total = _scaled(layers, 0, pyramid[0])
    for level, x in enumerate(pyramid[1:], start=1):
        total = total + _resized(_scaled(layers, level, x), total.shape[1:3], "bilinear", align_corners=False)
    return layers.gemm("head.conv_seg")(total)


def _scaled(layers: Layers, level: int, x: Tensor) -> Tensor:
    """A level of the pyramid, convolved and enlarged step by step to the highest resolution."""
    for i in range(max(1, level)):
        x = layers.gemm(f"head.scale.{level}.{i}")(x)
        if level:
            x = _resized(x, (x.shape[1] * 2, x.shape[2] * 2), "bilinear", align_corners=False)
    return x


def referring(layers: Layers, features: list[Tensor]) -> Tensor:
    """Logits (B,h,w,2) at the highest resolution."""
    x = features[3]
    for stage, feature in zip((4, 3, 2), reversed(features[:3]), strict=True):
        x = _resized(x, feature.shape[1:3], "bilinear", align_corners=True)
        x = layers.gemm(f"head.conv2_{stage}")(layers.gemm(f"head.conv1_{stage}")(x, x2=feature))
    return layers.gemm("head.conv1_1")(x)


def depth(layers: Layers, features: list[Tensor], size: tuple[int, int] | None) -> Tensor:
    """Last layer's output (B,H,W,1), before the sigmoid; `size` cuts off padding at the right and bottom."""
    x = layers.gemm("head.layer1.0")(features[0])
    x = layers.gemm("head.layer1.1")(apply_scale_shift(x, layers.norm("head.layer1.norm")(x)).relu_())
    lowest = _resized(features[3], features[2].shape[1:3], "nearest")
    parts = [x, layers.gemm("head.layer2")(features[1]), features[2], lowest]
    x = layers.gemm("head.out_layer")(torch.cat([part.to(x.dtype) for part in parts], dim=-1))
    x = apply_scale_shift(x, layers.norm("head.out_layer.norm")(x)).relu_()
    if size is not None:
        x = x[:, : size[0] // 32, : size[1] // 32].contiguous()
    for i in itertools.count():
        if f"head.deconv.{i}" not in layers:
            break
        x = _shuffled(layers.gemm(f"head.deconv.{i}")(x))
    x = layers.gemm("head.conv")(x)
    for _ in range(2):
        x = _resized(x, (x.shape[1] * 2, x.shape[2] * 2), "bilinear", align_corners=False)
    return layers.gemm("head.last.1")(layers.gemm("head.last.0")(x))


def _shuffled(x: Tensor) -> Tensor:
    """(B,h,w,4c), the channels of each of 2x2 pixels -> (B,2h,2w,c)."""
    batch, h, w, channels = x.shape
    return x.view(batch, h, w, 2, 2, channels // 4).transpose(2, 3).reshape(batch, 2 * h, 2 * w, channels // 4)


HEADS: dict[str, Callable[..., Tensor]] = {"segmentation": segmentation, "referring": referring, "depth": depth}
