"""A golden case: what the original VPD code returned for weights and inputs made from names and a seed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from vpd_fast import VPD, BackboneConfig, VPDConfig

from .golden_weights import golden_input, golden_tensor

FOLDER = Path(__file__).parent
CONFIG_FIELDS = (
    "task",
    "num_classes",
    "tokens",
    "num_scenes",
    "channels",
    "base_size",
    "max_attn_size",
    "attn_selector",
)


@dataclass
class GoldenCase:
    """`settings` of the case, the original's state-dict `keys`, and its `tensors` and losses to compare with."""

    name: str
    settings: dict = field(init=False)
    keys: dict[str, list[int]] = field(init=False)
    loss: float | None = field(init=False)
    grad_norms: dict[str, float | None] = field(init=False)

    def __post_init__(self) -> None:
        stored = json.loads((FOLDER / f"{self.name}.json").read_text())
        self.settings, self.keys = stored["case"], stored["keys"]
        self.loss, self.grad_norms = stored.get("loss"), stored.get("grad_norms", {})

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """What the original returned."""
        return load_file(FOLDER / f"{self.name}.safetensors")

    @cached_property
    def exact_gradients(self) -> dict[str, Tensor]:
        """Gradients of the plain model in float64, of the parameters whose gradients are among the tensors."""
        stored = load_file(FOLDER / "exact_gradients.safetensors")
        return {key.removeprefix(f"{self.name}."): x for key, x in stored.items() if key.startswith(f"{self.name}.")}

    @property
    def config(self) -> VPDConfig:
        """The configuration of the case's model."""
        known = {name: self.settings[name] for name in CONFIG_FIELDS if name in self.settings}
        return VPDConfig(**known, backbone=BackboneConfig(**self.settings["backbone"]))

    def state_dict(self, names: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The golden weights of these names and shapes."""
        seed = self.settings["seed"]
        return {
            name: torch.zeros(shape, dtype=torch.long)
            if name.endswith("num_batches_tracked")
            else torch.from_numpy(golden_tensor(name, tuple(shape), seed))
            for name, shape in names.items()
        }

    def model(self, **changes: object) -> VPD:
        """The model in eval mode, with the golden weights."""
        model = VPD.empty(self.config.replace(**changes))
        names = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        model.load_state_dict(self.state_dict(names), assign=True)
        return model.eval()

    def input(self, tag: str, shape: tuple[int, ...]) -> Tensor:
        """An input in [-1, 1] of this name."""
        return torch.from_numpy(golden_input(tag, shape, self.settings["seed"]))

    def inputs(self) -> tuple[Tensor, ...]:
        """The arguments of the model's forward."""
        settings, batch = self.settings, self.settings["batch"]
        size = settings.get("size") or [settings["base_size"]] * 2
        images = self.input("image", (batch, 3, *size))
        if settings["task"] == "referring":
            return images, 2 * self.input("tokens", (batch, settings["tokens"], settings["backbone"]["context_dim"]))
        if settings["task"] == "depth":
            return (images + 1) / 2, torch.tensor(settings["class_ids"])
        return (images,)

    def rng(self) -> np.random.Generator:
        """The generator of the labels and targets of the loss."""
        return np.random.default_rng((self.settings["seed"], 7))
