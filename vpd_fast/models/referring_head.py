"""VPD's decoder for referring segmentation (the one of LAVT, Yang et al. 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SimpleDecoding(nn.Module):
    """Three stages of two conv-BN-ReLU, each taking in the next higher resolution; two logits out."""

    def __init__(self, in_channels: tuple[int, ...]) -> None:
        super().__init__()
        hidden = in_channels[-1] // 2
        below = in_channels[3]
        for stage, channels in zip((4, 3, 2), reversed(in_channels[:3]), strict=True):
            self.add_module(f"conv1_{stage}", nn.Conv2d(below + channels, hidden, 3, padding=1, bias=False))
            self.add_module(f"bn1_{stage}", nn.BatchNorm2d(hidden))
            self.add_module(f"conv2_{stage}", nn.Conv2d(hidden, hidden, 3, padding=1, bias=False))
            self.add_module(f"bn2_{stage}", nn.BatchNorm2d(hidden))
            below = hidden
        self.conv1_1 = nn.Conv2d(hidden, 2, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Four features, high resolution first -> logits (B,2,h,w) at the highest one."""
        x = features[3]
        for stage, feature in zip((4, 3, 2), reversed(features[:3]), strict=True):
            x = F.interpolate(x, size=feature.shape[2:], mode="bilinear", align_corners=True)
            x = torch.cat([x, feature], dim=1)
            for i in (1, 2):
                conv, bn = getattr(self, f"conv{i}_{stage}"), getattr(self, f"bn{i}_{stage}")
                x = F.relu(bn(conv(x)))
        return self.conv1_1(x)
