"""What the models of all tasks have in common: text adapter and embeddings, KL encoder, UNet."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vpd_fast.config import VPDConfig
from vpd_fast.models.autoencoder import AutoencoderKL
from vpd_fast.models.meta import on_meta_device
from vpd_fast.models.unet import UNetWrapper


class TextAdapter(nn.Module):
    """texts + gamma * MLP(texts) (VPD, equation 4): one module for all three tasks, which differ in shapes only."""

    def __init__(self, text_dim: int, hidden_dim: int | None = None) -> None:
        super().__init__()
        hidden_dim = hidden_dim or text_dim
        self.fc = nn.Sequential(nn.Linear(text_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, text_dim))

    def forward(self, texts: Tensor, gamma: Tensor) -> Tensor:
        """texts (..., text_dim), gamma (text_dim,) -> (..., text_dim)."""
        return texts + gamma * self.fc(texts)


class Conditioning(nn.Module):
    """Text adapter, its scale `gamma` and, where a task has them, the embeddings of its classes or scenes."""

    text_adapter: TextAdapter
    gamma: nn.Parameter
    class_embeddings: Tensor  # (classes or scenes, context_dim); referring models have none

    def add_conditioning(self, config: VPDConfig) -> None:
        """Register the parts, with embeddings of zero."""
        width = config.backbone.context_dim
        self.text_adapter = TextAdapter(width, config.text_hidden_dim)
        self.gamma = nn.Parameter(torch.full((width,), config.gamma_init_value))
        if config.embedding_count is not None:
            self.register_buffer("class_embeddings", torch.zeros(config.embedding_count, width))

    @classmethod
    def frozen(cls, config: VPDConfig, tensors: Mapping[str, Tensor]) -> Conditioning:
        """The parts with these tensors, not copied, for inference. Raises RuntimeError if one is missing or unknown."""
        with on_meta_device():
            module = cls()
            module.add_conditioning(config)
        module.load_state_dict(tensors, assign=True)
        return module.requires_grad_(False).eval()


class Backbone(Conditioning):
    """Base of the module that holds encoder_vq, unet, text_adapter, gamma: the model itself, or depth's `encoder`."""

    encoder_vq: AutoencoderKL
    unet: UNetWrapper

    def add_backbone(self, config: VPDConfig) -> None:
        """Register the parts that all tasks have in common."""
        self.encoder_vq = AutoencoderKL(config.backbone).requires_grad_(config.train_encoder)
        self.unet = UNetWrapper(config)
        self.add_conditioning(config)
