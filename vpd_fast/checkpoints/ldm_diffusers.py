"""Names of Stable Diffusion 1.x's UNet and KL autoencoder in the original code ("ldm") and in diffusers, both ways.

The tables are generated from the network's layout. Names here carry no prefix: UNet names start at `input_blocks` or
`down_blocks`, autoencoder names at `encoder`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vpd_fast.config import BackboneConfig
from vpd_fast.errors import CheckpointError, brief

_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_VAE_MATRIX = re.compile(r"mid\.attn_1\.(q|k|v|proj_out)\.weight$")
_MAX_DIGITS = 2  # of the number of a level or a block
_PROJECTION = re.compile(r"\.proj_(in|out)\.weight$")


@dataclass(frozen=True)
class Layout:
    """The sizes that decide names: levels, residual blocks a level, and UNet levels with transformers."""

    levels: int = 4
    blocks: int = 2
    attention: frozenset[int] = frozenset({0, 1, 2})
    vae_levels: int = 4
    vae_blocks: int = 2

    @classmethod
    def of_config(cls, backbone: BackboneConfig) -> Layout:
        """Return the layout of a configured backbone."""
        levels = len(backbone.channel_mult)
        attention = frozenset(i for i in range(levels) if 2**i in backbone.attention_resolutions)
        blocks, vae_blocks = backbone.num_res_blocks, backbone.vae_num_res_blocks
        return cls(levels, blocks, attention, len(backbone.vae_ch_mult), vae_blocks)

    @classmethod
    def of_diffusers(cls, unet: Iterable[str], vae: Iterable[str]) -> Layout:
        """Return the layout that diffusers' UNet and autoencoder names belong to (either may be empty)."""
        unet, vae = list(unet), list(vae)
        levels = _count(unet, r"down_blocks\.(\d+)\.")
        attention = {int(m[1]) for key in unet if (m := re.match(r"down_blocks\.(\d+)\.attentions\.", key))}
        return cls(
            levels,
            _count(unet, r"down_blocks\.0\.resnets\.(\d+)\."),
            frozenset(attention),
            _count(vae, r"encoder\.down_blocks\.(\d+)\."),
            _count(vae, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        )


def _count(keys: Iterable[str], pattern: str) -> int:
    numbers = [m[1] for key in keys if (m := re.match(pattern, key))]
    if any(len(number) > _MAX_DIGITS for number in numbers):
        raise CheckpointError(f"names of weights have the number {brief(max(numbers, key=len))}; expected SD 1.x's")
    return 1 + max(map(int, numbers), default=-1)


def unet_modules(layout: Layout) -> dict[str, str]:
    """Return {ldm module: diffusers module} of the UNet."""
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        "middle_block.1": "mid_block.attentions.0",
    }

    def resnet(ldm: str, diffusers: str) -> None:
        table.update({f"{ldm}.{a}": f"{diffusers}.{b}" for a, b in _UNET_RESNET.items()})

    resnet("middle_block.0", "mid_block.resnets.0")
    resnet("middle_block.2", "mid_block.resnets.1")
    for level in range(layout.levels):
        down, first = f"down_blocks.{level}", 1 + level * (layout.blocks + 1)
        for i in range(layout.blocks):
            resnet(f"input_blocks.{first + i}.0", f"{down}.resnets.{i}")
            if level in layout.attention:
                table[f"input_blocks.{first + i}.1"] = f"{down}.attentions.{i}"
        if level < layout.levels - 1:
            table[f"input_blocks.{first + layout.blocks}.0.op"] = f"{down}.downsamplers.0.conv"
    for step, level in enumerate(reversed(range(layout.levels))):
        up, first = f"up_blocks.{step}", step * (layout.blocks + 1)
        for i in range(layout.blocks + 1):
            resnet(f"output_blocks.{first + i}.0", f"{up}.resnets.{i}")
            if level in layout.attention:
                table[f"output_blocks.{first + i}.1"] = f"{up}.attentions.{i}"
        if level > 0:
            position = 2 if level in layout.attention else 1
            table[f"output_blocks.{first + layout.blocks}.{position}.conv"] = f"{up}.upsamplers.0.conv"
    return table


def vae_modules(layout: Layout) -> dict[str, str]:
    """Return {ldm module: diffusers module} of the KL autoencoder, decoder included."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}

    def resnet(ldm: str, diffusers: str) -> None:
        table.update({f"{ldm}.{a}": f"{diffusers}.{b}" for a, b in _VAE_RESNET.items()})

    for half in ("encoder", "decoder"):
        table |= {f"{half}.{a}": f"{half}.{b}" for a, b in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"))}
        table[f"{half}.conv_out"] = f"{half}.conv_out"
        resnet(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0")
        resnet(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1")
        for a, b in _VAE_ATTENTION.items():
            table[f"{half}.mid.attn_1.{a}"] = f"{half}.mid_block.attentions.0.{b}"
    last = layout.vae_levels - 1
    for level in range(layout.vae_levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{last - level}"
        for i in range(layout.vae_blocks):
            resnet(f"encoder.down.{level}.block.{i}", f"{down}.resnets.{i}")
        for i in range(layout.vae_blocks + 1):
            resnet(f"decoder.up.{level}.block.{i}", f"{up}.resnets.{i}")
        if level < last:
            table[f"encoder.down.{level}.downsample.conv"] = f"{down}.downsamplers.0.conv"
        if level > 0:
            table[f"decoder.up.{level}.upsample.conv"] = f"{up}.upsamplers.0.conv"
    return table


def unet_to_diffusers(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Rename ldm's UNet tensors to diffusers' names. Raises CheckpointError on names that are not of this layout."""
    return _rename(tensors, unet_modules(layout), "UNet")


def unet_from_diffusers(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Invert `unet_to_diffusers`; projections stored as matrices become the 1x1 convolutions of SD 1.x."""
    renamed = _rename(tensors, _inverse(unet_modules(layout)), "UNet")
    return {
        key: value[..., None, None] if _PROJECTION.search(key) and value.dim() == 2 else value
        for key, value in renamed.items()
    }


def vae_to_diffusers(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Rename ldm's autoencoder tensors to diffusers' names; the attention's 1x1 convolutions become matrices."""
    flat = {k: v.flatten(1) if _VAE_MATRIX.search(k) and v.dim() == 4 else v for k, v in tensors.items()}
    return _rename(flat, vae_modules(layout), "autoencoder")


def vae_from_diffusers(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Invert `vae_to_diffusers`; reads the attention names of diffusers before 0.17 too."""
    current = {_modern_vae_name(key): value for key, value in tensors.items()}
    renamed = _rename(current, _inverse(vae_modules(layout)), "autoencoder")
    return {k: v[..., None, None] if _VAE_MATRIX.search(k) and v.dim() == 2 else v for k, v in renamed.items()}


def _modern_vae_name(key: str) -> str:
    module, _, parameter = key.rpartition(".")
    parent, _, last = module.rpartition(".")
    return f"{parent}.{_OLD_VAE_ATTENTION[last]}.{parameter}" if last in _OLD_VAE_ATTENTION else key


def _inverse(table: dict[str, str]) -> dict[str, str]:
    return {diffusers: ldm for ldm, diffusers in table.items()}


def _rename(tensors: Mapping[str, Any], modules: Mapping[str, str], network: str) -> dict[str, Any]:
    """Replace the longest known module prefix of every name."""
    renamed = {}
    for key, value in tensors.items():
        prefix = key.rpartition(".")[0]
        while prefix and prefix not in modules:
            prefix = prefix.rpartition(".")[0]
        if not prefix:
            raise CheckpointError(f"{brief(key)} is not a weight of Stable Diffusion 1.x's {network}")
        renamed[modules[prefix] + key[len(prefix) :]] = value
    return renamed
