"""The KL encoder of a fast model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from vpd_fast.engine.blocks import call, convolve, group_norm, one_head_attention, res_block
from vpd_fast.engine.layers import Layers
from vpd_fast.engine.workspace import Workspace


def encode(layers: Layers, images: Tensor, memory: Workspace) -> Tensor:
    """Images (B,H,W,3) in [-1,1] -> scaled latents (B,H/8,W/8,c)."""
    x = call(layers.gemm("encoder.conv_in"), memory, images, norm_follows=True)
    for step in _steps(layers):
        last, x = x, step(layers=layers, memory=memory, x=x)
        memory.give(last)
    conv_out = layers.gemm("encoder.conv_out")
    return conv_out(x, **group_norm(layers, "encoder.norm_out", memory, x, consumer=conv_out))


def _steps(layers: Layers) -> Iterator[Callable[..., Tensor]]:
    """The layers between conv_in and conv_out as functions, one tensor in and one out."""
    for level in itertools.count():
        for block in itertools.count():
            name = f"encoder.down.{level}.{block}"
            if f"{name}.conv1" not in layers:
                break
            yield partial(res_block, name=name)
        name = f"encoder.down.{level}.downsample"
        if name not in layers:
            break
        yield partial(convolve, name=name)
    yield partial(res_block, name="encoder.mid.block_1")
    yield partial(one_head_attention, name="encoder.mid.attn")
    yield partial(res_block, name="encoder.mid.block_2")
