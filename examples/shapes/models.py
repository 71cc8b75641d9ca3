"""The miniature Stable Diffusion of the shapes world: sizes, text encoder, autoencoder and denoiser.

Encoder and UNet are the package's own classes, so that VPD starts from them as it does from Stable Diffusion. What VPD
leaves out (the decoder, the UNet's output layers) is added here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpd_fast import BackboneConfig
from vpd_fast.models.attention import CrossAttention
from vpd_fast.models.autoencoder import AutoencoderKL
from vpd_fast.models.unet import ResBlock, SpatialTransformer, UNet

SIZE = 128  # pixels a side
TOKENS = 24  # positions of the text encoder
# Eight latent channels, not four: with four, 48 numbers become one, too few for edges at this size.
BACKBONE = BackboneConfig(
    model_channels=64, context_dim=96, num_heads=4, num_res_blocks=1, channel_mult=(1, 1, 1, 1),
    attention_resolutions=(4, 2, 1), vae_ch=32, vae_ch_mult=(1, 1, 2, 2), vae_num_res_blocks=1, in_channels=8,
)  # fmt: skip


def make_text_encoder(vocabulary: Mapping[str, int], start: str, end: str) -> Any:
    """A CLIPTextModel with fresh weights for a tokenizer's vocabulary."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary), hidden_size=BACKBONE.context_dim, intermediate_size=4 * BACKBONE.context_dim,
            num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=TOKENS, hidden_act="quick_gelu",
            projection_dim=BACKBONE.context_dim, bos_token_id=vocabulary[start], eos_token_id=vocabulary[end],
            pad_token_id=vocabulary[end],
        )
    )  # fmt: skip


class _DecoderBlock(nn.Module):
    """Three convolutions with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv(x))


class Decoder(nn.Module):
    """Latents -> image. Without norms, most work at low resolution: it is only needed for training and samples."""

    def __init__(self, latent_channels: int, widths: tuple[int, int, int] = (96, 64, 32), blocks: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(latent_channels, widths[0], 3, padding=1), nn.ReLU()]
        for i, width in enumerate(widths):
            layers += [_DecoderBlock(width) for _ in range(blocks)]
            following = 3 if i == len(widths) - 1 else widths[i + 1]
            layers += [nn.Conv2d(width, 4 * following, 3, padding=1), nn.PixelShuffle(2)]
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,3,8h,8w), about [-1,1]."""
        return self.layers(latents)


class Autoencoder(AutoencoderKL):
    """The package's KL encoder with a decoder."""

    def __init__(self, config: BackboneConfig = BACKBONE) -> None:
        super().__init__(config)
        self.decoder = Decoder(config.in_channels)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B,3,H,W) in [-1,1] -> mean and log-variance of the latents (B,C,H/8,W/8)."""
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 10)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images, about [-1,1]."""
        return self.decoder(self.post_quant_conv(latents))

    @torch.no_grad()
    def normalise(self, mean: Tensor, std: Tensor) -> None:
        """Shift and scale the latents, whose channels have this mean and spread (C,), to 0 and 1; images stay the same.

        VPD does not scale latents unless told to, so the factor of Stable Diffusion (0.18215) is in the weights here.
        """
        channels = len(mean)
        self.quant_conv.weight[:channels] /= std[:, None, None, None]
        self.quant_conv.bias[:channels] = (self.quant_conv.bias[:channels] - mean) / std
        self.quant_conv.bias[channels:] -= 2 * std.log()
        post = self.post_quant_conv
        post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
        post.weight *= std[None, :, None, None]


class Denoiser(UNet):
    """The package's UNet with its output layers: predicts the noise in latents. Key names as in latent diffusion."""

    def __init__(self, config: BackboneConfig = BACKBONE) -> None:
        super().__init__(config)
        width = config.model_channels * config.channel_mult[0]
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, config.in_channels, 3, padding=1))
        for module in self.modules():  # the weights of residual branches begin as zeros, as in latent diffusion
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.out_layers[3].weight)
            elif isinstance(module, SpatialTransformer):
                nn.init.zeros_(module.proj_out.weight)
            elif isinstance(module, CrossAttention):
                module.attention_backend = "sdpa"
        nn.init.zeros_(self.out[2].weight)

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """Noisy latents (B,C,h,w), timesteps (B,) 0..999, text features (B,L,context_dim) -> noise (B,C,h,w)."""
        features, _ = super().forward(latents, timesteps, context, {})
        return self.out(features[0])
