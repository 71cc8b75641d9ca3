"""The KL encoder of a fast model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from vpd_fast.engine.blocks import (
    Layers,
    call,
    convolve,
    group_norm,
    one_head_attention,
    res_block,
    to_nchw,
    to_nhwc,
)
from vpd_fast.engine.graphs import GraphCache
from vpd_fast.engine.workspace import Workspace, WorkspacePool


def run_encoder(layers: Layers, workspaces: WorkspacePool, graphs: GraphCache, images: Tensor) -> Tensor:
    """Images (B,3,H,W) in [-1,1] -> scaled latents (B,c,H/8,W/8) float32, channels-last in memory."""

    def stage(images: Tensor) -> list[Tensor]:
        with workspaces.lease() as memory:
            return [encode(layers, to_nhwc(images), memory).float()]

    return to_nchw(graphs.run("encode", stage, images)[0])


def encode(layers: Layers, images: Tensor, memory: Workspace) -> Tensor:
    """Images (B,H,W,3) in [-1,1] -> scaled latents (B,H/8,W/8,c)."""
    x = call(layers["encoder.conv_in"], memory, images, norm_follows=True)
    for step in _steps(layers):
        last, x = x, step(layers=layers, memory=memory, x=x)
        memory.give(last)
    conv_out = layers["encoder.conv_out"]
    return conv_out(x, **group_norm(layers, "encoder.norm_out", memory, x, consumer=conv_out))


def _steps(layers: Layers) -> Iterator[Callable[..., Tensor]]:
    """What happens between conv_in and conv_out, one tensor in and one out."""
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
