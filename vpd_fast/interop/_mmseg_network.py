"""The network of a segmentor, from what its config says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vpd_fast.config import VPDConfig
from vpd_fast.errors import InputError, brief
from vpd_fast.fields import check_keys, field_names
from vpd_fast.labels import ADE20K_CLASSES
from vpd_fast.models import VPD
from vpd_fast.training.build import build_model, own_memory
from vpd_fast.training.config import InitConfig, TrainConfig

TASK = "segmentation"
_GIVEN_ALONE = ("task", "num_classes", "class_names", "text_encoder")
_OF_OTHER_TASKS = ("tokens", "num_scenes", "max_depth")
SETTINGS = [name for name in field_names(VPDConfig) if name not in (*_GIVEN_ALONE, *_OF_OTHER_TASKS)]


@dataclass(frozen=True, kw_only=True)
class NetworkSource:
    """Where a segmentor's network comes from; the fields are arguments of `VPDSegmentor`, which explains them."""

    checkpoint: str | None
    stable_diffusion: str | None
    class_embeddings: str | None
    text_encoder: str | None
    ema: bool
    num_classes: int | None
    class_names: Sequence[str] | None
    settings: Mapping[str, Any] | None

    def build(self) -> VPD:
        """Make the network, on the CPU. Raises InputError, CheckpointError."""
        settings = _plain(self.settings or {})
        if not isinstance(settings, dict):
            raise InputError(f"settings must be a dict of fields of VPDConfig, got {brief(self.settings)}")
        check_keys(settings, SETTINGS, "settings")
        names = self._names()
        count = self.num_classes if self.num_classes is not None else len(names) or None
        self._check_source(count, names)
        if self.checkpoint is not None and not names and self.class_embeddings is None:
            return own_memory(self._loaded(settings))
        if not names and self.class_embeddings is None and count == len(ADE20K_CLASSES):
            names = ADE20K_CLASSES
        init = InitConfig(
            checkpoint=self.checkpoint, stable_diffusion=self.stable_diffusion,
            random=None if self.checkpoint or self.stable_diffusion else 0, class_embeddings=self.class_embeddings,
            text_encoder=self.text_encoder, ema=self.ema,
        )  # fmt: skip
        config = TrainConfig(task=TASK, model={**settings, "num_classes": count}, init=init)
        with torch.random.fork_rng():  # which the runner has seeded
            network, _ = build_model(config, names)
        return own_memory(network)

    def _names(self) -> tuple[str, ...]:
        names = self.class_names or ()
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise InputError(f"class_names must be a list of names, got {brief(self.class_names)}")
        if self.num_classes is not None and names and len(names) != self.num_classes:
            raise InputError(
                f"class_names has {len(names)} names and num_classes is {self.num_classes}: they must agree, or leave "
                "num_classes out"
            )
        return tuple(str(name) for name in names)

    def _check_source(self, count: int | None, names: Sequence[str]) -> None:
        if self.checkpoint is not None and self.stable_diffusion is not None:
            raise InputError(
                "checkpoint and stable_diffusion are both given: a model begins with one of them; leave the other out"
            )
        if count is None and (self.checkpoint is None or self.class_embeddings is not None):
            raise InputError(
                "the number of classes is not known: give num_classes (150 for ADE20K), class_names, or a checkpoint "
                "of vpd_fast or VPD alone, which tells it"
            )
        known = bool(names) or self.class_embeddings is not None or count == len(ADE20K_CLASSES)
        if self.stable_diffusion is not None and not known:
            raise InputError(
                f"stable_diffusion has no text embeddings of the {count} classes: give class_names, which "
                "text_encoder embeds, or class_embeddings, a file with them"
            )

    def _loaded(self, settings: dict[str, Any]) -> VPD:
        """The checkpoint's network as it is."""
        backbone = settings.pop("backbone", {})
        network = VPD.from_checkpoint(str(self.checkpoint), task=TASK, ema=self.ema, **backbone, **settings)
        found = network.config.num_classes
        if self.num_classes not in (None, found):
            raise InputError(
                f"{self.checkpoint} has {found} classes and num_classes is {self.num_classes}: leave num_classes out "
                "to use it as it is; to train it for other classes, give class_names, which text_encoder embeds, or "
                "class_embeddings, a file with them"
            )
        return network


def _plain(value: Any) -> Any:
    """Dicts and lists of a config as Python's own."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
