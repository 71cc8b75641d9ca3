"""One pass of a fast model, cut into the operations that `layers.py` times and `roofline.py` counts.

Both see the same pieces under the same labels, because the pieces are found here, while the engine's own code runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vpd_fast import BackboneConfig, VPDConfig, ops
from vpd_fast.bench.variants import conditioning
from vpd_fast.engine.layers import intercepted
from vpd_fast.engine.model import FastVPD

_SMALL = BackboneConfig(model_channels=64, context_dim=64, num_heads=4, vae_ch=64)
# Segmentation models that the scripts measure; the second is a fifth as wide, to try a script.
MODELS = {"full": VPDConfig(), "small": VPDConfig(num_classes=20, channels=64, base_size=128, backbone=_SMALL)}
STAGES = ("text", "encoder", "unet", "head", "post")
ALIASES = {"conv1": "3x3", "conv2": "3x3"}  # for layers whose last name says little
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
PHASES_OVER_DIRECT = 9 / 4  # products by definition of an enlarging 3x3 convolution, of those of four 2x2 ones


@dataclass(frozen=True)
class Label:
    """What one operation of a pass is.

    part: operations of a stage with the same part are reported together. precision: of the products. definition:
    products that the operation stands for, of those that are made; None: the operator knows.
    """

    stage: str
    part: str
    kind: str
    name: str
    precision: str
    side: int  # height of the result, in positions
    definition: float | None = None


Around = Callable[[Label, Callable[[], Any]], Any]


def directly(_: Label, call: Callable[[], Any]) -> Any:
    """The operation and nothing else."""
    return call()


class LabelledPass:
    """Passes of a model during which every operation goes through `around(label, call)`, which returns call()."""

    def __init__(self, model: FastVPD) -> None:
        self.model, self.stage, self.around = model, "", directly
        self._conditioning: dict[int, tuple] = {}
        self._precisions = {info.name: info.precision for info in model.infos}

    def __call__(
        self, images: Tensor, around: Around = directly, on_stage: Callable[[str], None] | None = None
    ) -> None:
        """One pass with labels (with metres for depth), for the same text or scene for all images.

        on_stage: told the name of each stage when it begins.
        """
        model, task = self.model, self.model.config.task
        self.prepare(len(images))
        self.around = around

        def begin(stage: str) -> None:
            self.stage = stage
            if on_stage:
                on_stage(stage)

        try:
            begin("encoder")
            latents = model.encode(images)
            begin("text")
            context = model.context(*self._conditioning[len(images)])
            begin("unet")
            features = model.features(latents, context)
            begin("head")
            result = model.decode(features)
            if task != "depth":
                begin("post")
                ops.upsample_argmax(result, images.shape[2:], align_corners=task == "referring")
        finally:
            self.around = directly

    def prepare(self, batch: int) -> None:
        """Makes the text or scene for so many images, so that it is no part of a pass."""
        if batch not in self._conditioning:
            config, device = self.model.config, self.model.device
            scenes = (None, batch)  # the mean of all
            self._conditioning[batch] = scenes if config.task == "depth" else conditioning(config, batch, device)

    def labelling(self, label: Callable[..., Label]) -> Callable[..., Any]:
        """What calls a layer or an operator, its first argument, through the pass's `around`."""
        return lambda call, *args, **options: self.around(label(*args, **options), lambda: call(*args, **options))

    def of_layer(self, name: str, layer: Any) -> Callable[..., Label]:
        """What makes the label of a layer's call from its arguments."""

        def label(x: Tensor, *_: Any, **__: Any) -> Label:
            side = x.shape[1] if x.dim() == 4 else math.isqrt(x.shape[1])
            if layer.kind not in ("group_norm", "linear"):
                side = layer.size(*x.shape[1:3])[0]
            kind = {"group_norm": "group norm", "linear": "linear"}.get(layer.kind, "convolution")
            phases = layer.kind == "conv2d" and layer.upsample
            definition = PHASES_OVER_DIRECT if phases else None
            precision = "fp32" if layer.kind == "group_norm" else self._precisions[name]
            return Label(name.partition(".")[0], _describe(name, layer, side), kind, name, precision, side, definition)

        return label

    def of_attention(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Label:
        """Return the label of a call of an attention operator.

        Self-attention takes parts of one tensor, or one for keys and values.
        """
        own = k is v or q.untyped_storage()._cdata == k.untyped_storage()._cdata
        kind, side = "self-attention" if own else "cross-attention", math.isqrt(q.shape[1])
        part = f"{kind} at {side}"
        return Label(self.stage, part, kind, f"{self.stage} {part}", NAMES[q.dtype], side)

    def of_post(self, _: Tensor, size: tuple[int, int], *__: Any, **___: Any) -> Label:
        """Return the label of a call of upsample_argmax."""
        return Label("post", "upsample_argmax", "upsample_argmax", "upsample_argmax", "fp32", size[0])


def _describe(name: str, layer: Any, side: int) -> str:
    last = name.rpartition(".")[2]
    if layer.kind == "group_norm":
        return f"group norm at {side}"
    if layer.kind == "conv2d" and layer.stride == 2:
        return f"3x3 of stride 2 to {side}"
    if getattr(layer, "upsample", False):
        return f"3x3 enlarging to {side}"
    if layer.kind == "winograd_conv2d":
        return f"3x3 at {side}"
    return f"{ALIASES.get(last, last)} at {side}"


@contextmanager
def labelled(model: FastVPD) -> Iterator[LabelledPass]:
    """Passes of the model with labels and without graphs, as long as the context lasts. Enter it before the model has
    seen a text.

    The layers stay what they are (`intercepted`), because the engine asks: what only stands in for a convolution is
    not given the ranges of its input, and finds them in a pass of its own.
    """
    run = LabelledPass(model)
    layers = {
        name: intercepted(layer, run.labelling(run.of_layer(name, layer))) for name, layer in model.layers.items()
    }
    attention = ("self_attention", "cross_attention_maps", "cross_attention_maps_into")
    functions = dict.fromkeys(attention, run.of_attention) | {"upsample_argmax": run.of_post}
    with ExitStack() as stack:
        stack.callback(setattr, model, "graphs", model.graphs)
        model.graphs = False
        stack.enter_context(mock.patch.dict(model.layers, layers))
        for name, label in functions.items():
            stack.enter_context(mock.patch.object(ops, name, partial(run.labelling(label), getattr(ops, name))))
        yield run
