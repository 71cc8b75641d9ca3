"""A tiny segmentation model with the methods prediction uses; its logits come from local averages of the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpd_fast import VPDConfig

CELL = 8


class StandIn(nn.Module):
    """Logits: a fixed mix of the 8x8 block averages and of their place in the window, so that windows differ."""

    def __init__(self, num_classes: int = 5, base_size: int = 128) -> None:
        super().__init__()
        self.config = VPDConfig(num_classes=num_classes, base_size=base_size)
        self.register_buffer("class_embeddings", torch.zeros(num_classes, 4))
        self.gamma = nn.Parameter(torch.zeros(4))
        self.mix = nn.Parameter(torch.randn(num_classes, 5, generator=torch.Generator().manual_seed(0)))
        self.dropout = nn.Dropout(0.5)
        self.sizes: list[tuple[int, ...]] = []

    @property
    def device(self) -> torch.device:
        return self.mix.device

    @property
    def dtype(self) -> torch.dtype:
        return self.mix.dtype

    @property
    def conditioning(self) -> StandIn:
        return self

    def text_adapter(self, texts: Tensor, gamma: Tensor) -> Tensor:
        return texts

    def encode(self, images: Tensor) -> Tensor:
        assert images.shape[2] % 64 == 0
        assert images.shape[3] % 64 == 0
        self.sizes.append(tuple(images.shape))
        return F.avg_pool2d(images, CELL)

    def features(self, latents: Tensor, context: Tensor) -> list[Tensor]:
        n, _, height, width = latents.shape
        y = torch.linspace(-1, 1, height, dtype=latents.dtype).view(1, 1, -1, 1).expand(n, 1, height, width)
        x = torch.linspace(-1, 1, width, dtype=latents.dtype).view(1, 1, 1, -1).expand(n, 1, height, width)
        return [self.dropout(torch.cat([latents, y, x], 1))]

    def extract_feat(self, images: Tensor) -> list[Tensor]:
        return self.features(self.encode(images), self.class_embeddings[None])

    def decode(self, features: list[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        logits = 3 * torch.einsum("kc,nchw->nkhw", self.mix, features[0])
        return logits if size is None else F.interpolate(logits, size, mode="bilinear", align_corners=False)

    def split_maps(self, features: list[Tensor]) -> tuple[list[Tensor], dict[int, Tensor]]:
        maps = torch.einsum("kc,nchw->nkhw", self.mix, features[0]).softmax(1)
        return features, {1: maps, 2: F.avg_pool2d(maps, 2)}

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(self.extract_feat(images), images.shape[2:])
