"""The ways to compute the network that are measured, and the model's own: plain, and fast in every precision."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast.bench.parity import Outputs, make_images
from vpd_fast.config import LATENT_STRIDE, VPDConfig
from vpd_fast.models import VPD
from vpd_fast.ops import upsample_argmax

STAGES = ("encoder", "unet", "head", "post")
BACKBONE = STAGES[:2]  # what variants without maps and head have, too


@dataclass(frozen=True)
class Case:
    """Images of one forward pass."""

    size: int  # height and width in pixels, a multiple of 64
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.batch}x3x{self.size}x{self.size}"

    @property
    def pixels(self) -> int:
        """Of all images."""
        return self.batch * self.size * self.size


@dataclass(frozen=True)
class Source:
    """Where a variant's weights come from, and what it may write."""

    checkpoint: Path  # that `load_checkpoint` reads
    scratch: Path  # folder
    threads: int

    def load(self) -> VPD:
        """The plain model, its weights in the file until they are used."""
        from vpd_fast.checkpoints import load_checkpoint

        return load_checkpoint(self.checkpoint)


class Variant(Protocol):
    """One way to compute the network, weights loaded."""

    def prepare(self, case: Case) -> None:
        """Get ready for images of this case."""

    def run(self) -> tuple[dict[str, float], Outputs]:
        """One forward pass: seconds of each stage it has, and what came out."""


class Stopwatch:
    """Seconds of stages that follow each other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """The stage that began with the last call ends now."""
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now


def conditioning(config: VPDConfig, batch: int) -> tuple:
    """What `VPD.context` takes besides images: the same random sentence, or the first scene, for every image."""
    if config.task == "segmentation":
        return (batch,)
    if config.task == "referring":
        sentence = torch.randn(
            1, config.tokens, config.backbone.context_dim, generator=torch.Generator().manual_seed(0)
        )
        return (sentence.expand(batch, -1, -1).contiguous(),)
    return (torch.zeros(batch, dtype=torch.long),)


class ModelVariant:
    """A `VPD`, plain or fast, with everything it does for a prediction on images of its own size.

    label: makes labels of logits (B,C,h,w) and a size (H,W); what the model's kind does best.
    """

    def __init__(self, model: VPD, label: Callable[..., Tensor]) -> None:
        self.model, self._label = model, label

    def prepare(self, case: Case) -> None:
        """Get ready for images of this case."""
        device = self.model.device
        self._images = make_images(case.batch, case.size).to(device)
        parts = conditioning(self.model.config, case.batch)
        self._conditioning = tuple(x.to(device) if isinstance(x, Tensor) else x for x in parts)

    def run(self) -> tuple[dict[str, float], Outputs]:
        """One forward pass; depth has metres for logits and no labels."""
        task, watch = self.model.config.task, Stopwatch()
        with torch.inference_mode():
            latents = self.model.encode(self._images)
            watch.lap("encoder")
            features = self.model.features(latents, self.model.context(*self._conditioning))
            watch.lap("unet")
            logits, labels = self.model.decode(features), None
            watch.lap("head")
            if task != "depth":
                labels = self._label(logits, self._images.shape[2:], align_corners=task == "referring")
                watch.lap("post")
        return watch.seconds, Outputs(latents, features, logits, labels)


def plain_labels(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """As the original has them."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners).argmax(1)


def make_plain(source: Source, attention_backend: str = "plain") -> Variant:
    """The plain model."""
    model = source.load()
    model.attention_backend = attention_backend
    return ModelVariant(model, plain_labels)


def plain_bytes(config: VPDConfig, case: Case) -> int:
    """Memory for the probabilities that the plain model holds at its peak, which is most of what it needs.

    At latent resolution, in every head: scores and scaled scores, or scaled scores and probabilities, in float32.
    """
    positions = (case.size // LATENT_STRIDE) ** 2
    return 2 * 4 * case.batch * config.backbone.num_heads * positions**2


def make_fast(source: Source, precision: str) -> Variant:
    """`vpd_fast.optimize` of the plain model."""
    import vpd_fast

    return ModelVariant(vpd_fast.optimize(source.load(), precision), upsample_argmax)


def make_loaded(_: Source, folder: Path) -> Variant:
    """A fast model that was saved in `folder`, without the weights it was made from."""
    import vpd_fast

    return ModelVariant(vpd_fast.load_engine(folder), upsample_argmax)
