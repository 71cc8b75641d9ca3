"""How well a variant agrees with the plain model. A speed-up is shown only behind a gate that passed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# Least cosine of every feature map and of the logits, by the precision a variant computes in.
GATES = {"fp32": 0.9999, "bf16": 0.999, "fp16": 0.999, "int8": 0.995, "fp8": 0.98}


@dataclass(frozen=True)
class Outputs:
    """What one forward pass gave: latents, features (high resolution first; maybe the first of them only, maybe without
    maps), head output at its own resolution, labels."""

    latents: Tensor
    features: list[Tensor]
    logits: Tensor | None = None
    labels: Tensor | None = None

    def save(self, path: Path) -> None:
        """Write them as safetensors."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "features"}
        named |= {f"features.{i}": feature for i, feature in enumerate(self.features)}
        save_file({k: _plain(v) for k, v in named.items() if v is not None}, path)

    @classmethod
    def load(cls, path: Path) -> Outputs:
        """Read what `save` wrote; the tensors stay in the file."""
        tensors = load_file(path)
        features = [tensors[f"features.{i}"] for i in range(sum(name.startswith("features.") for name in tensors))]
        return cls(tensors["latents"], features, tensors.get("logits"), tensors.get("labels"))


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    return tensor.cpu().clone(memory_format=torch.contiguous_format)  # tensors that share memory cannot be saved


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two tensors, in float64; NaN if one is not finite or zero."""
    a, b = a.double().flatten(), b.double().flatten()
    return (a @ b / (a.norm() * b.norm())).item()


def agreement(outputs: Outputs, expected: Outputs) -> dict[str, Any]:
    """{"latents", "features", "logits"}: cosines to the plain model's; {"labels"}: share of equal ones.

    Features without maps are compared with the plain model's without maps. What a variant does not compute is left out.
    """
    pairs = zip(outputs.features, expected.features, strict=False)
    found: dict[str, Any] = {
        "latents": cosine(outputs.latents, expected.latents),
        "features": [cosine(own, other[:, : own.shape[1]]) for own, other in pairs],
    }
    if outputs.logits is not None and expected.logits is not None:
        found["logits"] = cosine(outputs.logits, expected.logits)
    if outputs.labels is not None and expected.labels is not None:
        found["labels"] = (outputs.labels == expected.labels).double().mean().item()
    return found


def passes(found: dict[str, Any], precision: str) -> bool:
    """Whether the cosines of features and logits reach the gate of the precision; NaN does not."""
    cosines = [*found["features"], *([found["logits"]] if "logits" in found else [])]
    return all(value >= GATES[precision] for value in cosines)


def failed(row: dict[str, Any]) -> bool:
    """Whether a row of `report.row_of` has no times, or times of something that does not agree."""
    return "error" in row or row.get("parity") == "failed"


def make_images(batch: int, size: int) -> Tensor:
    """Images (batch,3,size,size) in [-1,1], always the same: smooth regions with some noise, as photos have."""
    generator = torch.Generator().manual_seed(size)
    coarse = torch.rand(batch, 3, size // 32 + 2, size // 32 + 2, generator=generator) * 2 - 1
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    return (smooth + 0.1 * torch.randn(batch, 3, size, size, generator=generator)).clamp(-1, 1)
