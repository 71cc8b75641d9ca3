"""VPD's depth head: a merge of the features at 1/32 and three deconvolutions (Xiao et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpd_fast.models.backbone import Backbone

WIDTH = 192
DECONV_CHANNELS = (32, 32, 32)


class FeatureMerge(Backbone):
    """All four features at 1/32 of the image, merged by a 1x1 convolution; depth models keep their backbone in it."""

    def __init__(self, in_channels: tuple[int, ...]) -> None:
        super().__init__()
        c0, c1, c2 = in_channels[0], in_channels[1], in_channels[2] + in_channels[3]
        self.layer1 = nn.Sequential(
            nn.Conv2d(c0, c0, 3, stride=2, padding=1),
            nn.GroupNorm(16, c0),
            nn.ReLU(),
            nn.Conv2d(c0, c0, 3, stride=2, padding=1),
        )
        self.layer2 = nn.Sequential(nn.Conv2d(c1, c1, 3, stride=2, padding=1))
        self.out_layer = nn.Sequential(nn.Conv2d(c0 + c1 + c2, 8 * WIDTH, 1), nn.GroupNorm(16, 8 * WIDTH), nn.ReLU())
        _initialize(self, partial(nn.init.trunc_normal_, std=0.02))

    def merge(self, features: list[Tensor]) -> Tensor:
        """Four features, high resolution first -> (B,1536,H/32,W/32)."""
        lowest = F.interpolate(features[3], scale_factor=2, mode="nearest")
        parts = [self.layer1(features[0]), self.layer2(features[1]), features[2], lowest]
        return self.out_layer(torch.cat(parts, dim=1))


class DepthDecoder(nn.Module):
    """Three 2x2 deconvolutions, one 3x3 convolution, then twice bilinear x2: 1/32 -> full resolution."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 8 * WIDTH
        for width in DECONV_CHANNELS:
            layers += [nn.ConvTranspose2d(channels, width, 2, stride=2, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.deconv_layers = nn.Sequential(*layers)
        self.conv_layers = nn.Sequential(nn.Conv2d(channels, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU())
        _initialize(self, partial(nn.init.normal_, std=0.001))

    def forward(self, x: Tensor) -> Tensor:
        """(B,1536,h,w) -> (B,192,32h,32w)."""
        x = self.conv_layers(self.deconv_layers(x))
        for _ in range(2):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return x


def last_layer_depth() -> nn.Sequential:
    """(B,192,H,W) -> (B,1,H,W), before the sigmoid."""
    layers = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU(), nn.Conv2d(WIDTH, 1, 3, padding=1))
    _initialize(layers, partial(nn.init.normal_, std=0.001))
    return layers


def _initialize(module: nn.Module, init: Callable[[Tensor], Tensor]) -> None:
    for child in module.modules():
        if isinstance(child, (nn.Conv2d, nn.ConvTranspose2d)):
            init(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
