"""The KL encoder of a fast model."""

from __future__ import annotations

import itertools

from torch import Tensor

from vpd_fast.engine.blocks import Layers, one_head_attention, res_block


def encode(layers: Layers, images: Tensor) -> Tensor:
    """Images (B,H,W,3) in [-1,1] -> scaled latents (B,H/8,W/8,c)."""
    x = layers["encoder.conv_in"](images)
    for level in itertools.count():
        for block in itertools.count():
            name = f"encoder.down.{level}.{block}"
            if f"{name}.conv1" not in layers:
                break
            x = res_block(layers, name, x)
        downsample = layers.get(f"encoder.down.{level}.downsample")
        if downsample is None:
            break
        x = downsample(x)
    x = res_block(layers, "encoder.mid.block_1", x)
    x = one_head_attention(layers, "encoder.mid.attn", x)
    x = res_block(layers, "encoder.mid.block_2", x)
    return layers["encoder.conv_out"](x, affine=layers["encoder.norm_out"](x))
