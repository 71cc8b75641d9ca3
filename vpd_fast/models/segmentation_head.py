"""Semantic FPN (Kirillov et al. 2019): neck and head of VPD's segmentation, with mmsegmentation's key names."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vpd_fast.errors import InputError
from vpd_fast.models.modules import ModuleList


class ConvModule(nn.Module):
    """Convolution (`conv`), or convolution without bias, batch norm (`bn`) and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm_relu: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=not norm_relu)
        self.norm_relu = norm_relu
        if norm_relu:
            self.bn = nn.BatchNorm2d(out_channels)
            nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        else:
            nn.init.xavier_uniform_(self.conv.weight)
            nn.init.zeros_(self.conv.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        """(B,in,h,w) -> (B,out,h,w)."""
        x = self.conv(x)
        return F.relu(self.bn(x)) if self.norm_relu else x


class FPN(nn.Module):
    """Feature pyramid: 1x1 laterals, top-down sums (nearest upsampling), 3x3 outputs."""

    def __init__(self, in_channels: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.lateral_convs = ModuleList(ConvModule(c, channels, 1, norm_relu=False) for c in in_channels)
        self.fpn_convs = ModuleList(ConvModule(channels, channels, 3, norm_relu=False) for _ in in_channels)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Four features, high resolution first -> as many of `channels` channels, same sizes."""
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, features, strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            size = laterals[i - 1].shape[2:]
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=size, mode="nearest")
        return [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=True)]


class FPNHead(nn.Module):
    """Brings the pyramid to its highest resolution, sums it and classifies."""

    def __init__(self, channels: int, num_classes: int, levels: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.scale_heads: ModuleList[nn.Sequential] = ModuleList()
        for level in range(levels):
            layers: list[nn.Module] = []
            for _ in range(max(1, level)):
                layers.append(ConvModule(channels, channels, 3, norm_relu=True))
                if level:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scale_heads.append(nn.Sequential(*layers))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.get_parameter("bias"))

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        """Four maps of `channels` channels, high resolution first -> logits (B,num_classes,h,w) at the highest one."""
        batch, _, height, width = pyramid[-1].shape
        if self.training and batch * height * width == 1:
            raise InputError(
                "the head's batch norms have one number per channel, of which there are no statistics: train with a "
                "batch_size of at least 2, or with images larger than 64x64 (size)"
            )
        x = self.scale_heads[0](pyramid[0])
        for head, level in zip(self.scale_heads[1:], pyramid[1:], strict=True):
            # The sizes already agree for images that are multiples of 64; this is an exact no-op then.
            x = x + F.interpolate(head(level), size=x.shape[2:], mode="bilinear", align_corners=False)
        return self.conv_seg(self.dropout(x))
