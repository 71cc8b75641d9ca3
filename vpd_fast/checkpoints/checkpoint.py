"""An opened checkpoint of any format, and the prefixes of names inside."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vpd_fast.checkpoints.infer import infer_backbone
from vpd_fast.checkpoints.mapped import MappedFile
from vpd_fast.config import BackboneConfig, VPDConfig
from vpd_fast.errors import CheckpointError

LDM_UNET = "model.diffusion_model."
LDM_VAE = "first_stage_model."
LDM_TEXT = "cond_stage_model.transformer."
CONFIG_KEY = "vpd_fast_config"  # our configuration inside files of other formats


@dataclass
class Checkpoint:
    """An opened checkpoint.

    format: "pretrained" (own folder), "bundled" (of the package), "vpd" (released or own file), "mmseg" (depth port),
    "ldm" or "diffusers". tensors: by ldm names for the last two, else by VPD names. config: only where the checkpoint
    stores one of ours. metadata: class_names, max_depth and num_heads where known. contents: what else the file holds.
    files: those that tensors are mapped from.
    """

    path: Path
    format: str
    tensors: dict[str, Tensor]
    config: VPDConfig | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    contents: tuple[str, ...] = ()
    placeholders: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    files: tuple[MappedFile, ...] = ()

    @property
    def is_stable_diffusion(self) -> bool:
        """Whether this is Stable Diffusion, not a VPD model."""
        return self.format in ("ldm", "diffusers")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors: {name: shape}."""
        return {key: tuple(tensor.shape) for key, tensor in self.tensors.items()}

    def backbone(self, **overrides: Any) -> BackboneConfig:
        """Infer the sizes of Stable Diffusion's networks. Raises CheckpointError when they are not SD 1.x's."""
        shapes = self.shapes
        unet, vae = (
            {key[len(prefix) :]: shape for key, shape in shapes.items() if key.startswith(prefix)}
            for prefix in (LDM_UNET, LDM_VAE)
        )
        heads = {"num_heads": self.metadata["num_heads"]} if "num_heads" in self.metadata else {}
        try:
            return infer_backbone(unet, vae, **heads, **overrides)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
