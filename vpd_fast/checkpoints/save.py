"""Writes checkpoints. A file appears under its name only when it is complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpd_fast import bundled
from vpd_fast.checkpoints import reader
from vpd_fast.checkpoints.checkpoint import CONFIG_KEY
from vpd_fast.checkpoints.checksums import checksums
from vpd_fast.checkpoints.infer import ENCODER
from vpd_fast.checkpoints.names import without_wrappers
from vpd_fast.config import VPDConfig
from vpd_fast.errors import CheckpointError
from vpd_fast.files import CHECKSUMS, CONFIG_NAME, WEIGHTS_NAME, Writer, as_path, write_files, write_json
from vpd_fast.models.vpd import VPD


def save_pretrained(model: VPD, folder: str | Path) -> None:
    """Write `model` as config.json and model.safetensors into `folder`, which is made if need be.

    config.json also has check sums of the weights, which `verify` compares. Dtypes are kept. Raises CheckpointError
    when the folder cannot be written; then nothing in it has changed.
    """
    write_files(pretrained_writers(as_path(folder, "folder"), model.config, model.state_dict()), CheckpointError)


def pretrained_writers(folder: Path, config: VPDConfig, tensors: Mapping[str, Tensor]) -> dict[Path, Writer]:
    """Return the writers, as `write_files` takes them, of the two files of a model's folder."""
    clean = without_wrappers(tensors)  # of torch.compile and the like inside the model
    return {
        folder / WEIGHTS_NAME: lambda path: write_safetensors(path, clean, config),
        folder / CONFIG_NAME: lambda path: write_json(path, config.to_dict() | {CHECKSUMS: checksums(clean)}),
    }


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], config: VPDConfig | None = None) -> None:
    """Write a .safetensors file; a configuration goes into its metadata."""
    from safetensors.torch import save_file

    metadata = {"format": "pt"}
    if config is not None:
        metadata[CONFIG_KEY] = json.dumps(config.to_dict())
    save_file(_separate(tensors), path, metadata=metadata)


def write_bundled(
    folder: Path,
    name: str,
    tensors: Mapping[str, Tensor],
    config: VPDConfig,
    record: Mapping[str, Any],
    step: float | None = None,
) -> None:
    """Write a model's file, with the `step` of `bundled.pack_model`, and, from its encoder, the shared one.

    Raises CheckpointError if the shared file is there and would change.
    """
    from safetensors.torch import save_file

    root = config.key_prefix + ENCODER
    shared, others = bundled.pack_model(tensors, root, step)
    path = folder / f"{bundled.SHARED}.safetensors"
    if path.exists():
        present = reader.read_file(path).tensors
        # Packing what was unpacked gives the same bytes but for the last bit of a scale.
        if present.keys() != shared.keys() or not all(
            torch.allclose(present[key].float(), shared[key].float(), rtol=1e-6, atol=0) for key in shared
        ):
            raise CheckpointError(f"{path}: is the encoder of other weights than {name}; remove it to write a new set")
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(config.to_dict()), bundled.RECORD: json.dumps(record)}
    write_files(
        {
            path: lambda temporary: save_file(shared, temporary, metadata={"format": "pt"}),
            folder / f"{name}.safetensors": lambda temporary: save_file(others, temporary, metadata=metadata),
        }
    )


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return detached, contiguous tensors; no two share memory, which safetensors refuses to write."""
    result: dict[str, Tensor] = {}
    addresses: set[int] = set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        result[key] = tensor.clone() if tensor.data_ptr() in addresses else tensor
        addresses.add(tensor.data_ptr())
    return result
