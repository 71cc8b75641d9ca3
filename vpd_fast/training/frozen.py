"""The image encoder in training: frozen, so it needs no gradient and may run as fast as inference does."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from vpd_fast.config import PRECISIONS
from vpd_fast.engine import FastEncoder
from vpd_fast.errors import InputError
from vpd_fast.models import VPD

PLAIN = "plain"


class FrozenEncoder:
    """Encodes images (B,3,H,W) in [-1,1], sides multiples of 64, to latents (B,4,H/8,W/8) float32, times latent_scale.

    precision: "plain", the model's own encoder as the original runs it; "fp32", "bf16" or "int8", on GPUs also "fp16"
        and "fp8", the encoder of the fast model. Those keep packed copies of its 34 million weights; the model keeps
        its own for its checkpoints.

    Raises InputError for a model whose encoder trains, and for precisions that the device does not have.
    """

    def __init__(self, model: VPD, precision: str = "bf16") -> None:
        if model.config.train_encoder:
            raise InputError("a model with train_encoder=True has no frozen encoder; its latents need gradients")
        if precision not in (PLAIN, *PRECISIONS):
            raise InputError(
                f"the encoder's precision must be one of {', '.join((PLAIN, *PRECISIONS))}, got {precision!r}"
            )
        self.precision, self._model = precision, model
        self._encode = model.encode if precision == PLAIN else FastEncoder(model, precision).encode

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the mean of the latents' distribution, as the original takes it. Raises InputError."""
        return self._encode(images).contiguous()

    @property
    def identity(self) -> str:
        """Hash of the weights, the precision and the scale, which changes whenever other latents would come out."""
        digest = hashlib.blake2b(
            f"{self.precision} {self._model.config.latent_scale} {self._model.device.type}".encode()
        )
        for name, tensor in sorted(self._model.backbone.encoder_vq.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()
