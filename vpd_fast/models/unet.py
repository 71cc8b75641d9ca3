"""Stable Diffusion's UNet as a feature extractor that also returns averaged attention maps."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vpd_fast.config import BackboneConfig, VPDConfig
from vpd_fast.models.attention import BasicTransformerBlock, MapSum
from vpd_fast.models.attention_backends import PLAIN
from vpd_fast.models.modules import ModuleList


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding (B,) -> (B,dim) float32, cosines first, as in latent diffusion."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class ResBlock(nn.Module):
    """Residual block conditioned on the time embedding."""

    def __init__(self, channels: int, emb_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out_channels),
            nn.SiLU(),
            nn.Dropout(0.0),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = out_channels == channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B,channels,h,w), emb (B,emb_channels) -> (B,out_channels,h,w)."""
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class SpatialTransformer(nn.Module):
    """One transformer block over the positions of a feature map, with a residual."""

    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = ModuleList([BasicTransformerBlock(channels, context_dim, heads)])
        self.proj_out = nn.Conv2d(channels, channels, 1)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, context: Tensor, map_sums: Mapping[str, MapSum]) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B,C,h,w), context (B or 1,L,context_dim) -> x, new sums of maps {kind: (B, h*w, L or h*w)}."""
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        (block,) = self.transformer_blocks
        if self.gradient_checkpointing and torch.is_grad_enabled():
            tokens, maps = _checkpoint_transformer(block, tokens, context, map_sums)
        else:
            tokens, maps = block(tokens, context, map_sums)
        return x + self.proj_out(tokens.transpose(1, 2).unflatten(2, x.shape[2:])), maps


def _checkpoint_transformer(
    block: BasicTransformerBlock, tokens: Tensor, context: Tensor, map_sums: Mapping[str, MapSum]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run `block` keeping only its inputs for backward."""
    if torch.compiler.is_compiling():  # the compiler recomputes what backward needs, and no more
        return checkpoint(lambda *x: block(*x, map_sums), tokens, context, use_reentrant=False)
    first = [map_sums]
    # Maps are not recomputed: backward needs nothing that making them would save. Nor are their sums kept. But
    # self-attention must take the same way again, and fused it is another for maps.
    fused_self = "self" in map_sums and block.attn1.attention_backend != PLAIN
    again: dict[str, MapSum] = {"self": (1.0, None)} if fused_self else {}

    def run(tokens: Tensor, context: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return block(tokens, context, first.pop() if first else again)

    return checkpoint(run, tokens, context, use_reentrant=False)


class Downsample(nn.Module):
    """3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C,h/2,w/2)."""
        return self.op(x)


class Upsample(nn.Module):
    """Nearest x2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C,2h,2w)."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class UNetBlock(nn.Sequential):
    """The layers of one entry of `input_blocks`, `middle_block` or `output_blocks`."""

    gradient_checkpointing = False

    def forward(
        self, x: Tensor, emb: Tensor, context: Tensor, map_sums: Mapping[str, MapSum]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Feature map in, feature map and the new sums of maps out."""
        maps: dict[str, Tensor] = {}
        for layer in self:
            if isinstance(layer, ResBlock):
                if self.gradient_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(layer, x, emb, use_reentrant=False)
                else:
                    x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x, maps = layer(x, context, map_sums)
            else:
                x = layer(x)
        return x, maps


class BlockPlace(NamedTuple):
    """Where a block of the UNet is; level 0 has the latents' resolution, level 3 an eighth of it."""

    name: str
    place: str  # "down", "mid" or "up"
    level: int
    gives_feature: bool = False


@functools.cache
def unet_places(config: BackboneConfig) -> tuple[BlockPlace, ...]:
    """The places of all blocks in the order in which they run; they follow from the configuration alone."""
    lowest, count = len(config.channel_mult) - 1, config.num_res_blocks
    downs = [0]
    for level in range(lowest + 1):
        downs += [level] * count + [level + 1] * (level < lowest)  # the last one downsamples
    ups = [level for level in range(lowest, -1, -1) for _ in range(count + 1)]
    # The last block of each level before its upsampling one, and the very last block.
    features = {(count + 1) * n - 2 for n in range(1, lowest + 1)} | {len(ups) - 1}
    return (
        *(BlockPlace(f"input_blocks.{i}", "down", level) for i, level in enumerate(downs)),
        BlockPlace("middle_block", "mid", lowest),
        *(BlockPlace(f"output_blocks.{i}", "up", level, i in features) for i, level in enumerate(ups)),
    )


@functools.cache
def map_weights(config: VPDConfig) -> Mapping[tuple[str, int], Mapping[str, float]]:
    """{(place, level): {kind: weight}} of the transformer blocks whose maps are wanted: 1 / how many share a mean.

    place: "down", "mid" or "up". kind: "cross" or "self".
    """
    backbone = config.backbone
    blocks = {("mid", len(backbone.channel_mult) - 1): 1}
    for level in range(len(backbone.channel_mult)):
        if 2**level in backbone.attention_resolutions:
            blocks |= {("down", level): backbone.num_res_blocks, ("up", level): backbone.num_res_blocks + 1}
    weights: dict[tuple[str, int], dict[str, float]] = {}
    for kind in ("cross", "self"):
        for level in range(len(backbone.channel_mult)):
            places = [p for p in ("down", "mid", "up") if (p, level) in blocks and f"{p}_{kind}" in config.map_sources]
            for place in places if config.map_channels(level) else ():
                count = sum(blocks[p, level] for p in places)
                weights.setdefault((place, level), {})[kind] = 1 / count
    return weights


class UNet(nn.Module):
    """The UNet without its output layers. Key names: those of CompVis latent diffusion (`diffusion_model.*`)."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.model_channels = config.model_channels
        emb_channels = config.model_channels * 4
        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        widths = [config.model_channels * m for m in config.channel_mult]
        lowest = len(widths) - 1

        def block(in_channels: int, level: int) -> list[nn.Module]:
            layers: list[nn.Module] = [ResBlock(in_channels, emb_channels, widths[level])]
            if 2**level in config.attention_resolutions:
                layers.append(SpatialTransformer(widths[level], config.context_dim, config.num_heads))
            return layers

        self.places = unet_places(config)
        channels = config.model_channels
        self.input_blocks = ModuleList([UNetBlock(nn.Conv2d(config.in_channels, channels, 3, padding=1))])
        skips = [channels]
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(UNetBlock(*block(channels, level)))
                channels = width
                skips.append(channels)
            if level < lowest:
                self.input_blocks.append(UNetBlock(Downsample(channels)))
                skips.append(channels)

        self.middle_block = UNetBlock(
            ResBlock(channels, emb_channels, channels),
            SpatialTransformer(channels, config.context_dim, config.num_heads),
            ResBlock(channels, emb_channels, channels),
        )
        self.output_blocks: ModuleList[UNetBlock] = ModuleList()
        for level in range(lowest, -1, -1):
            for i in range(config.num_res_blocks + 1):
                layers = block(channels + skips.pop(), level)
                channels = widths[level]
                if level and i == config.num_res_blocks:
                    layers.append(Upsample(channels))
                self.output_blocks.append(UNetBlock(*layers))

    def blocks(self) -> Iterator[tuple[BlockPlace, UNetBlock]]:
        """All blocks in the order in which they run, and where each is."""
        yield from zip(self.places, [*self.input_blocks, self.middle_block, *self.output_blocks], strict=True)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor,
        map_weights: Mapping[tuple[str, int], Mapping[str, float]],
    ) -> tuple[list[Tensor], dict[tuple[int, str], Tensor]]:
        """One pass.

        latents (B,4,h,w), h and w multiples of 8; timesteps (B,); context (B or 1,L,context_dim);
        map_weights: {(place, level): {kind: weight}} of the layers whose maps are wanted.
        Returns four features, high resolution first, and per (level, kind) the weighted sum of the layers' head-mean
        maps, (B, positions, L or positions).
        """
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(latents.dtype))
        maps: dict[tuple[int, str], Tensor] = {}

        features: dict[int, Tensor] = {}
        skips: list[Tensor] = []
        h = latents
        for (_, place, level, gives_feature), block in self.blocks():
            if place == "up":
                h = torch.cat([h, skips.pop()], dim=1)
            weights = map_weights.get((place, level), {})
            h, sums = block(h, emb, context, {kind: (w, maps.get((level, kind))) for kind, w in weights.items()})
            maps |= {(level, kind): total for kind, total in sums.items()}
            if place == "down":
                skips.append(h)
            if gives_feature:
                features[level] = h
        return [features[level] for level in sorted(features)], maps


class DiffusionModel(nn.Module):
    """The UNet under the name that it has in latent diffusion's checkpoints."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.diffusion_model = UNet(config)


class UNetWrapper(nn.Module):
    """UNet at t = 1 whose features carry the averaged maps (VPD, section 3.2). Keys `unet.diffusion_model.*`."""

    def __init__(self, config: VPDConfig) -> None:
        super().__init__()
        self.unet = DiffusionModel(config.backbone)
        self.map_grad = config.map_grad
        self.map_weights = map_weights(config)

    def forward(self, latents: Tensor, context: Tensor) -> list[Tensor]:
        """latents (B,4,h,w), context (B or 1,L,context_dim) -> four features, cross maps and then self maps last."""
        timesteps = torch.ones(latents.shape[0], dtype=torch.long, device=latents.device)
        features, maps = self.unet.diffusion_model(latents, timesteps, context, self.map_weights)
        for level, kind in sorted(maps):
            mean = maps[level, kind].transpose(1, 2).unflatten(2, features[level].shape[2:])
            if not self.map_grad:
                mean = mean.detach()
            features[level] = torch.cat([features[level], mean.to(features[level].dtype)], dim=1)
        return features

    def set_gradient_checkpointing(self, levels: Collection[int]) -> None:
        """Keep only the inputs of residual and transformer blocks of these levels for backward; 0 is the finest."""
        for place, block in self.unet.diffusion_model.blocks():
            for module in block.modules():
                if isinstance(module, (UNetBlock, SpatialTransformer)):
                    module.gradient_checkpointing = place.level in levels
