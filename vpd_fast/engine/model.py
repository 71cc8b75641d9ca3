"""Fast models: the calls of `vpd_fast.VPD`, computed by fused layers. `vpd_fast.optimize` makes them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpd_fast.config import VPDConfig
from vpd_fast.engine.base import Engine
from vpd_fast.engine.blocks import to_nchw, to_nhwc
from vpd_fast.engine.build import LayerInfo
from vpd_fast.engine.heads import HEADS
from vpd_fast.engine.layers import Layer, Layers
from vpd_fast.engine.report import EngineReport
from vpd_fast.engine.unet import run_unet
from vpd_fast.errors import InputError
from vpd_fast.models.attention_backends import PLAIN
from vpd_fast.models.backbone import Conditioning
from vpd_fast.models.perceiver import DepthPerceiver, Perceiver, ReferringPerceiver, SegmentationPerceiver

# Attributes of a torch.nn.Module, and of a plain model, that are those of the conditioning here.
_OF_CONDITIONING = (
    *("text_adapter", "gamma", "class_embeddings"),
    *("parameters", "named_parameters", "buffers", "named_buffers", "modules", "named_modules", "children"),
)
_CONVERSIONS = ("to", "cpu", "cuda", "float", "half", "bfloat16", "double")
# Methods of a plain model that only do something here when they are switched off, by False as first argument.
_REFUSED = {
    "train": "a fast model is for inference only; train the plain model and optimize it again",
    "load_state_dict": "a fast model cannot load checkpoints; load the plain model and optimize it again",
    "save_pretrained": "a fast model is no checkpoint; use save(folder), or save_pretrained of the plain model",
    "gradient_checkpointing_enable": "a fast model has no gradients to checkpoint",
    "requires_grad_": "a fast model has no gradients",
}


class FastVPD(Engine, Perceiver):
    """A fast model of any task, for inference only; several threads may call one at once.

    Images, features, maps and results are float32 whatever the precision of the layers. It is no torch.nn.Module, but
    `eval()`, `parameters()`, `state_dict()` and the like work, on the text adapter and the embeddings, which are not
    part of the layers. `train()`, `load_state_dict()`, `half()` and what else would change the model raise InputError.
    """

    is_fast = True
    training = False

    def __new__(cls, config: VPDConfig | None = None, *_: Any, **__: Any) -> FastVPD:
        return object.__new__(_FAST[config.task] if cls is FastVPD and config is not None else cls)

    def __init__(
        self,
        config: VPDConfig,
        conditioning: Mapping[str, Tensor],
        layers: Mapping[str, Layer],
        infos: tuple[LayerInfo, ...],
        precision: str,
    ) -> None:
        """The fast model of the configuration's task.

        conditioning: entries of the plain model's state dict that no layer replaces: text adapter and embeddings.
        """
        parts = {name.removeprefix(config.key_prefix): tensor for name, tensor in conditioning.items()}
        self.config, self.conditioning = config, Conditioning.frozen(config, parts)
        super().__init__(Layers(layers), infos, precision, self.conditioning.gamma.device)

    @staticmethod
    def is_conditioning(config: VPDConfig, key: str) -> bool:
        """Whether a key of the plain model's state dict is kept as it is."""
        names = ("text_adapter.", "gamma", "class_embeddings")
        return key.startswith(tuple(config.key_prefix + name for name in names))

    @property
    def backbone(self) -> Conditioning:
        return self.conditioning

    @torch.no_grad()
    def features(self, latents: Tensor, context: Tensor) -> list[Tensor]:
        self._check_latents(latents, context)
        if context.stride(0) == 0:
            context = context[:1]  # one text for all images
        text = self._text(context)

        def stage(latents: Tensor) -> list[Tensor]:
            with self._workspaces.lease() as memory:
                return run_unet(self.layers, self.config, to_nhwc(latents), text, memory)

        return [to_nchw(x) for x in self._graphs.run("features", stage, latents, state=text)]

    @torch.no_grad()
    def _head(self, features: list[Tensor], *size: tuple[int, int] | None) -> Tensor:
        def stage(*features: Tensor) -> list[Tensor]:
            return [HEADS[self.task](self.layers, [to_nhwc(x) for x in features], *size).float()]

        return to_nchw(self._graphs.run(f"decode{size}", stage, *features)[0])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def report(self, sensitivity: bool = False) -> EngineReport:
        """What each layer became and why; prints as a table.

        sensitivity: with the signal-to-noise ratio of each 8-bit layer's result on the calibration images. Raises
        InputError if there were none.
        """
        return EngineReport(self.config, self.precision, self.infos, sensitivity)

    def save(self, folder: str | Path) -> None:
        """Write the layers as they are into `folder`: `vpd_fast.load_engine` starts from it without other weights."""
        from vpd_fast.engine.storage import save_engine

        save_engine(self, folder)

    def _save(self, folder: Path) -> None:
        self.save(folder)

    def state_dict(self) -> dict[str, Tensor]:
        """Text adapter and embeddings by the plain model's keys; rounded and merged weights are no part of it."""
        return self.conditioning.state_dict(prefix=self.config.key_prefix)

    def eval(self) -> FastVPD:
        """The model itself, which is always in evaluation mode."""
        return self

    @property
    def attention_backend(self) -> str:
        """Always "plain": a fast model has kernels of its own. Setting another raises InputError."""
        return PLAIN

    @attention_backend.setter
    def attention_backend(self, name: str) -> None:
        if name != PLAIN:
            raise InputError("a fast model has attention kernels of its own; attention_backend is for plain models")

    def __getattr__(self, name: str) -> Any:
        """Attributes of a plain model: some are those of the conditioning, others raise InputError when called."""
        if name in _OF_CONDITIONING:
            return getattr(self.conditioning, name)
        if name in _CONVERSIONS:
            return partial(self._convert, name)
        if name in _REFUSED:
            return partial(self._refuse, _REFUSED[name])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _convert(self, method: str, *args: Any, **kwargs: Any) -> FastVPD:
        """The model itself, where `to`, `cuda`, `half` and the like would change nothing. Raises InputError."""
        message = (
            f"a fast model stays where it is ({self.device}) and in the precision it was made for ({self.precision}); "
            "optimize the plain model again for another one"
        )
        gamma = self.conditioning.gamma
        try:
            converted = getattr(gamma, method)(*args, **kwargs)
        except (AssertionError, RuntimeError) as error:  # a device that is not there
            raise InputError(message) from error
        if (converted.device, converted.dtype) != (gamma.device, gamma.dtype):
            raise InputError(message)
        return self

    def _refuse(self, message: str, *args: Any, **kwargs: Any) -> FastVPD:
        """The model itself if the first argument is False. Raises InputError."""
        if [*args, *kwargs.values()][:1] == [False]:
            return self
        raise InputError(message)


class FastSegmentation(SegmentationPerceiver, FastVPD):
    """Fast form of VPDSegmentation."""


class FastReferring(ReferringPerceiver, FastVPD):
    """Fast form of VPDReferring."""


class FastDepth(DepthPerceiver, FastVPD):
    """Fast form of VPDDepth."""


_FAST: dict[str, type[FastVPD]] = {cls.task: cls for cls in (FastSegmentation, FastReferring, FastDepth)}
