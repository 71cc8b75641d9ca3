"""Fast models: the calls of `vpd_fast.VPD`, computed by fused layers. `vpd_fast.optimize` makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpd_fast.config import SIZE_MULTIPLE, VPDConfig
from vpd_fast.engine import heads
from vpd_fast.engine.blocks import to_nchw, to_nhwc
from vpd_fast.engine.build import LayerInfo
from vpd_fast.engine.encoder import run_encoder
from vpd_fast.engine.graphs import GraphCache
from vpd_fast.engine.layers import Layer
from vpd_fast.engine.report import EngineReport
from vpd_fast.engine.text import TextMemo
from vpd_fast.engine.unet import Structure, run_unet
from vpd_fast.engine.workspace import WorkspacePool
from vpd_fast.errors import InputError
from vpd_fast.models import checks
from vpd_fast.models.attention_backends import PLAIN
from vpd_fast.models.vpd import VPD, VPDDepth, VPDReferring, VPDSegmentation

# What the layers replace, by task: attributes of the model.
_REPLACED = {
    "segmentation": ("encoder_vq", "unet", "neck", "decode_head"),
    "referring": ("encoder_vq", "unet", "classifier"),
    "depth": (
        "encoder.encoder_vq",
        "encoder.unet",
        "encoder.layer1",
        "encoder.layer2",
        "encoder.out_layer",
        "decoder",
        "last_layer_depth",
    ),
}


class FastVPD(VPD):
    """What the fast models of all tasks have in common. Inference only; several threads may call one at once.

    Images, features, maps and results are float32 whatever the precision of the layers.
    """

    layers: Mapping[str, Layer]
    precision: str
    infos: tuple[LayerInfo, ...]

    @classmethod
    def assemble(
        cls,
        config: VPDConfig,
        conditioning: Mapping[str, Tensor],
        layers: Mapping[str, Layer],
        infos: tuple[LayerInfo, ...],
        precision: str,
    ) -> FastVPD:
        """The fast model of a task from its layers.

        conditioning: the plain model's state dict without what layers replace: text adapter, embeddings.
        """
        model = _FAST[config.task].empty(config)
        structure = Structure.of(model.backbone.unet, config.backbone.num_heads)
        for path in _REPLACED[config.task]:
            owner, _, name = path.rpartition(".")
            delattr(model.get_submodule(owner), name)
        nn.Module.load_state_dict(model, dict(conditioning), assign=True)
        model.requires_grad_(False)
        nn.Module.train(model, False)
        model.layers, model.infos, model.precision = dict(layers), infos, precision
        model._structure, model._text = structure, TextMemo(model.layers)
        model._workspaces, model._graphs = WorkspacePool(model.device), GraphCache()
        return model

    @staticmethod
    def is_conditioning(config: VPDConfig, key: str) -> bool:
        """Whether a key of the plain model's state dict is kept as it is."""
        return not key.startswith(tuple(f"{path}." for path in _REPLACED[config.task]))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) in [-1,1], H and W multiples of 64 -> latents (B,4,H/8,W/8), times `latent_scale`."""
        checks.images(images, self.device, self.dtype, SIZE_MULTIPLE)
        return run_encoder(self.layers, self._workspaces, self._graphs, images)

    @torch.no_grad()
    def features(self, latents: Tensor, context: Tensor) -> list[Tensor]:
        """Latents (B,4,h,w), adapted text (B,L,context_dim) -> four features at 1, 1/2, 1/4, 1/8 of the latents' size.

        float32, channels-last; maps last, as the plain model has them. Projections of the last texts are kept.
        """
        if context.stride(0) == 0:
            context = context[:1]  # one text for all images
        text = self._text(context)

        def stage(latents: Tensor) -> list[Tensor]:
            with self._workspaces.lease() as memory:
                features, maps = run_unet(self.layers, self._structure, to_nhwc(latents), text, memory)
                parts = [[x.float()] for x in features]
                for level, kind in sorted(maps.sums):
                    parts[level].append(maps.sums[level, kind].view(*features[level].shape[:3], -1))
                return [torch.cat(part, dim=-1) for part in parts]  # a copy, which outlives the workspace

        return [to_nchw(x) for x in self._graphs.run("features", stage, latents, state=text)]

    def _decode(self, head: Callable[..., Tensor], features: list[Tensor], *size: tuple[int, int] | None) -> Tensor:
        """What a head makes of features (B,C,H,W): (B,c,h,w) float32."""
        checks.feature_channels(features, self.config.feature_channels)

        def stage(*features: Tensor) -> list[Tensor]:
            return [head(self.layers, [to_nhwc(x) for x in features], *size).float()]

        return to_nchw(self._graphs.run(f"decode{size}", stage, *features)[0])

    @property
    def graphs(self) -> bool:
        """Whether encoder, UNet and head run as CUDA graphs, captured when images of a size come for the first time.

        True by default, and of no effect on a CPU.
        """
        return self._graphs.enabled

    @graphs.setter
    def graphs(self, enabled: bool) -> None:
        self._graphs.enabled = enabled

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

    @property
    def attention_backend(self) -> str:
        """Always "plain": a fast model has kernels of its own. Setting another raises InputError."""
        return PLAIN

    @attention_backend.setter
    def attention_backend(self, name: str) -> None:
        if name != PLAIN:
            raise InputError("a fast model has attention kernels of its own; attention_backend is for plain models")

    def train(self, mode: bool = True) -> FastVPD:
        """Only mode=False: a fast model has no gradients. Raises InputError."""
        if mode:
            raise InputError("a fast model is for inference only; train the plain model and optimize it again")
        return super().train(False)

    def load_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        """Raises InputError: the layers no longer hold the weights that a checkpoint has."""
        raise InputError("a fast model cannot load checkpoints; load the plain model and optimize it again")

    def save_pretrained(self, folder: str | Path) -> NoReturn:
        """Raises InputError: rounded and merged weights are no checkpoint; see `save`."""
        raise InputError("a fast model is no checkpoint; use save(folder), or save_pretrained of the plain model")

    def gradient_checkpointing_enable(self, levels: bool | Iterable[int] = True) -> None:
        """Raises InputError unless levels is False: there are no gradients."""
        if levels is not False:
            raise InputError("a fast model has no gradients to checkpoint")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FastVPD:
        """What `to`, `cuda`, `half` and the like do, and here may only do where they change nothing."""
        message = (
            f"a fast model stays where it is ({self.device}) and in the precision it was made for ({self.precision}); "
            "optimize the plain model again for another one"
        )
        try:
            probe = fn(self.backbone.gamma)
        except (AssertionError, RuntimeError) as error:  # a device that is not there
            raise InputError(message) from error
        if (probe.device, probe.dtype) != (self.device, self.dtype):
            raise InputError(message)
        return self


class FastSegmentation(FastVPD, VPDSegmentation):
    """Fast form of VPDSegmentation."""

    @torch.no_grad()
    def decode(self, features: list[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """Features -> logits (B,num_classes,h,w) at 1/8 of the image, or resized bilinearly to `size`."""
        logits = self._decode(heads.segmentation, features)
        return logits if size is None else F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


class FastReferring(FastVPD, VPDReferring):
    """Fast form of VPDReferring."""

    @torch.no_grad()
    def decode(self, features: list[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """Features -> logits (B,2,h,w) at 1/8 of the image, or resized bilinearly (align_corners) to `size`."""
        logits = self._decode(heads.referring, features)
        return logits if size is None else F.interpolate(logits, size=size, mode="bilinear", align_corners=True)


class FastDepth(FastVPD, VPDDepth):
    """Fast form of VPDDepth."""

    @torch.no_grad()
    def decode(self, features: list[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """Features -> depth (B,1,H,W) in metres; `size` cuts off padding at the right and bottom (multiples of 32)."""
        return torch.sigmoid(self._decode(heads.depth, features, size)) * self.config.max_depth


_FAST: dict[str, type[FastVPD]] = {cls.task: cls for cls in (FastSegmentation, FastReferring, FastDepth)}
