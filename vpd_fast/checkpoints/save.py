"""Writes checkpoints. A file appears under its name only when it is complete."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpd_fast import files
from vpd_fast.checkpoints.formats import CONFIG_KEY, CONFIG_NAME, WEIGHTS_NAME
from vpd_fast.config import VPDConfig
from vpd_fast.errors import CheckpointError
from vpd_fast.models.vpd import VPD


def save_pretrained(model: VPD, folder: str | Path) -> None:
    """Write `model` as config.json and model.safetensors into `folder`, which is made if need be.

    Dtypes are kept. Raises CheckpointError when the folder cannot be written; then nothing in it has changed.
    """
    write_pretrained(folder, model.config, model.state_dict())


def write_pretrained(folder: str | Path, config: VPDConfig, tensors: Mapping[str, Tensor]) -> None:
    """As `save_pretrained`, from a configuration and a state dict."""
    folder = Path(folder)
    write_files(
        {
            folder / WEIGHTS_NAME: lambda path: write_safetensors(path, tensors, config),
            folder / CONFIG_NAME: config.save,
        }
    )


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], config: VPDConfig | None = None) -> None:
    """Write a .safetensors file; a configuration goes into its metadata."""
    from safetensors.torch import save_file

    metadata = {"format": "pt"}
    if config is not None:
        metadata[CONFIG_KEY] = json.dumps(config.to_dict())
    save_file(_separate(tensors), path, metadata=metadata)


def write_torch(path: Path, content: dict[str, Any]) -> None:
    """Write a file of torch.save."""
    torch.save(content, path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_files(writers: Mapping[Path, Callable[[Path], None]]) -> None:
    """`vpd_fast.files.write_files`, whose failures become one CheckpointError."""
    try:
        files.write_files(writers)
    except Exception as error:  # torch and safetensors report a full disk as errors of their own
        raise CheckpointError(f"{next(iter(writers))}: cannot be written ({error})") from error


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached, contiguous tensors, no two of which share memory, which safetensors refuses to write."""
    result: dict[str, Tensor] = {}
    addresses: set[int] = set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        result[key] = tensor.clone() if tensor.data_ptr() in addresses else tensor
        addresses.add(tensor.data_ptr())
    return result
