"""What differs between the tasks in a training step: the inputs of the network, and its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpd_fast.config import SIZE_MULTIPLE
from vpd_fast.models import VPD
from vpd_fast.training.config import QuirksConfig
from vpd_fast.training.losses import referring_loss, segmentation_loss, silog_loss

Encode = Callable[[Tensor], Tensor]  # images (B,3,H,W) in [-1,1] on any device, sides multiples of 64 -> latents
Sentences = Callable[[Sequence[str]], Tensor]  # sentences -> token features (S,tokens,context_dim) float32

PADDING = 0.0  # mid-grey once images are in [-1,1]


class Task:
    """Makes inputs and loss of a task: `prepare` needs no gradient and may run ahead, backward goes through `loss`."""

    def __init__(self, model: VPD, quirks: QuirksConfig, sentences: Sentences | None = None) -> None:
        self.name = model.config.task
        self.quirks = quirks
        self.sentences = sentences
        self.train_encoder = model.config.train_encoder

    def prepare(self, batch: dict[str, Any], encode: Encode, device: torch.device) -> dict[str, Tensor]:
        """Convert a batch of a TrainLoader to what `loss` takes, on `device`: "latents", "target", and the text's part.

        Where the encoder is trained, "latents" are the images in its place.
        """
        images = batch["image"]  # where it is: a cache of latents looks at the pixels
        inputs = {"target": batch["target"].to(device, non_blocking=True)}
        if self.name == "depth":
            height, width = images.shape[2:]
            padding = (0, -width % SIZE_MULTIPLE, 0, -height % SIZE_MULTIPLE)
            images = F.pad(images * 2.0 - 1.0, padding, value=PADDING)
            inputs["class_id"] = batch["class_id"].to(device, non_blocking=True)
        elif self.name == "referring":
            assert self.sentences is not None
            inputs["tokens"] = self.sentences(batch["sentence"]).to(device, non_blocking=True)
        if self.train_encoder:
            return {**inputs, "latents": images.to(device, non_blocking=True)}
        with torch.no_grad():
            return {**inputs, "latents": encode(images)}

    def loss(self, model: VPD, inputs: dict[str, Tensor]) -> Tensor:
        """Return the loss, a float32 scalar with a graph."""
        latents, target = inputs["latents"], inputs["target"]
        size = target.shape[1], target.shape[2]
        if self.train_encoder:
            latents = model.encode(latents)
        if self.name == "segmentation":
            logits = model.decode(model.features(latents, model.context(len(latents))))
            return segmentation_loss(logits.float(), target, ignored_in_mean=self.quirks.ignored_in_mean)
        if self.name == "referring":
            features = model.features(latents, model.context(inputs["tokens"]))
            return referring_loss(model.decode(features, size).float(), target)
        features = model.features(latents, _scene_context(model, inputs["class_id"]))
        return silog_loss(model.decode(features, size).float(), target)


def _scene_context(model: VPD, ids: Tensor) -> Tensor:
    """Return the adapted embeddings (B,1,context_dim) of the scenes, their mean where an id is negative (unknown)."""
    known = model.class_embeddings[ids.clamp(min=0)]
    embeddings = torch.where((ids < 0)[:, None], model.class_embeddings.mean(0, keepdim=True), known)
    return model.backbone.text_adapter(embeddings, model.backbone.gamma)[:, None]


class TrainStep(nn.Module):
    """The part of a step that has gradients, as a module: wrapped for several processes, its forward synchronises them.

    forward: what `Task.prepare` returned -> the loss. dtype: of autocast; None: everything in float32.
    """

    def __init__(self, model: VPD, task: Task, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.dtype = dtype

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the loss of a batch, a scalar."""
        with torch.autocast(inputs["latents"].device.type, self.dtype, enabled=self.dtype is not None):
            return self.task.loss(self.model, inputs)
