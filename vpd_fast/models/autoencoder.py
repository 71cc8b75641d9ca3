"""The encoder half of Stable Diffusion's KL autoencoder; VPD uses the mean of its Gaussian and has no decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpd_fast.config import BackboneConfig
from vpd_fast.models.attention_backends import PLAIN, attention
from vpd_fast.models.modules import ModuleList


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two GroupNorm-SiLU-conv3x3 stages with a residual."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B,in,h,w) -> (B,out,h,w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with a residual.

    With any `attention_backend` but "plain" it goes through SDPA: its 512 channels are more than other libraries take.
    """

    attention_backend = PLAIN

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C,h,w)."""
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        scale = x.shape[1] ** -0.5
        if self.attention_backend == PLAIN:
            out = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1) @ v
        else:
            # SDPA would store the probabilities of strided channels, as NCHW convolutions give them.
            out = attention("sdpa", q.contiguous(), k.contiguous(), v.contiguous(), heads=1, scale=scale)
        return x + self.proj_out(out.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """3x3 convolution of stride 2, padded at the right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C,h/2,w/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class EncoderLevel(nn.Module):
    """Residual blocks of one width; all levels but the last end with a downsampling convolution."""

    def __init__(self, in_channels: int, width: int, blocks: int, downsample: bool) -> None:
        super().__init__()
        self.block = ModuleList(ResnetBlock(width if i else in_channels, width) for i in range(blocks))
        self.downsample = Downsample(width) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        """(B,in,h,w) -> (B,width,h/2,w/2), or (B,width,h,w) from the last level."""
        for block in self.block:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class EncoderMiddle(nn.Module):
    """Attention between two residual blocks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C,h,w)."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Image -> moments (mean and log-variance) of the latents, before `quant_conv`."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        widths = [config.vae_ch * m for m in config.vae_ch_mult]
        self.conv_in = nn.Conv2d(3, config.vae_ch, 3, padding=1)
        self.down: ModuleList[EncoderLevel] = ModuleList()
        channels = config.vae_ch
        for level, width in enumerate(widths):
            self.down.append(EncoderLevel(channels, width, config.vae_num_res_blocks, level < len(widths) - 1))
            channels = width
        self.mid = EncoderMiddle(channels)
        self.norm_out = _norm(channels)
        self.conv_out = nn.Conv2d(channels, 2 * config.in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B,3,H,W) in [-1,1] -> (B,8,H/8,W/8)."""
        h = self.conv_in(x)
        for down in self.down:
            h = down(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class AutoencoderKL(nn.Module):
    """KL encoder with the key names of the released checkpoints (`encoder_vq.*`)."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.in_channels, 2 * config.in_channels, 1)
        # Belongs to the decoder and is never run; released checkpoints carry it.
        self.post_quant_conv = nn.Conv2d(config.in_channels, config.in_channels, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Mean of the latent Gaussian, which is its mode: images (B,3,H,W) in [-1,1] -> (B,4,H/8,W/8), unscaled."""
        mean, _log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean
