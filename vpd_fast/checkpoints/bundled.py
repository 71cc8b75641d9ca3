"""Weights that come with the package: miniatures trained on the shapes world (`vpd_fast.data.shapes`).

Files of vpd_fast/assets: NAME.safetensors with 8-bit weights, one scale per output channel; what all models have in
common, the KL encoder, is in a file of its own; shapes-text/ is their CLIP text encoder. They are made by
examples/shapes/pack.py, and their metadata say with which settings and how good they are.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpd_fast.checkpoints import reader
from vpd_fast.checkpoints.formats import CONFIG_KEY, CONFIG_NAME, WEIGHTS_NAME, Checkpoint
from vpd_fast.checkpoints.infer import ENCODER
from vpd_fast.config import VPDConfig
from vpd_fast.errors import CheckpointError
from vpd_fast.files import write_files

ASSETS = Path(__file__).parent.parent / "assets"
NAMES = ("shapes-segmentation", "shapes-referring", "shapes-depth")
TEXT_ENCODER = "shapes-text"
SHARED = "shapes-encoder"
RECORD = "record"  # of how the weights were made and measured, in the metadata
_SCALE = ".scale"


def is_bundled(path: str | Path) -> bool:
    """Whether this is the name of bundled weights or of the bundled text encoder, and no file or folder with weights.

    Other folders of that name, of training runs for example, do not hide what comes with the package.
    """
    path = Path(path)
    if str(path) not in (*NAMES, TEXT_ENCODER) or path.is_file():
        return False
    return not any((path / name).exists() for name in (CONFIG_NAME, WEIGHTS_NAME, "text_encoder", "unet"))


def asset(name: str) -> Path:
    """The file or folder of a bundled name. Raises CheckpointError where it is missing."""
    path = ASSETS / (name if name == TEXT_ENCODER else f"{name}.safetensors")
    if not (path / "text_encoder" / WEIGHTS_NAME if name == TEXT_ENCODER else path).is_file():
        raise CheckpointError(
            f"{name}: these weights come with the package, but {path} is missing; in a source checkout "
            "examples/shapes/make.sh makes them, in about three hours on two cores"
        )
    return path


def open_bundled(name: str) -> Checkpoint:
    """Weights in float32, configuration, and in `metadata` the record. Raises CheckpointError."""
    if name == TEXT_ENCODER:
        raise CheckpointError(f"{name} is a text encoder; expected one of {', '.join(NAMES)}")
    own, shared = (reader.read_file(asset(part)) for part in (name, SHARED))
    try:
        config = VPDConfig.from_dict(json.loads(own.metadata[CONFIG_KEY]))
        record = dict(json.loads(own.metadata[RECORD]))
        root = "encoder." if config.task == "depth" else ""
        tensors = {f"{root}{ENCODER}{key}": tensor for key, tensor in unpack(shared.tensors).items()}
        tensors |= unpack(own.tensors)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{own.path} or {shared.path.name} is damaged ({error}); expected what examples/shapes/pack.py writes"
        ) from error
    return Checkpoint(Path(name), "bundled", tensors, config, {RECORD: record})


def write_bundled(
    folder: Path, name: str, tensors: Mapping[str, Tensor], config: VPDConfig, record: Mapping[str, Any]
) -> None:
    """Write a model's file and, from its encoder, the shared one. Raises CheckpointError if that would change."""
    from safetensors.torch import save_file

    root = f"{'encoder.' if config.task == 'depth' else ''}{ENCODER}"
    shared = pack({key[len(root) :]: tensor for key, tensor in tensors.items() if key.startswith(root)})
    path = folder / f"{SHARED}.safetensors"
    if path.exists():
        present = reader.read_file(path).tensors
        # Packing what was unpacked gives the same bytes but for the last bit of a scale.
        if present.keys() != shared.keys() or not all(
            torch.allclose(present[key].float(), shared[key].float(), rtol=1e-6, atol=0) for key in shared
        ):
            raise CheckpointError(f"{path}: is the encoder of other weights than {name}; remove it to write a new set")
    own = pack({key: tensor for key, tensor in tensors.items() if not key.startswith(root)})
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(config.to_dict()), RECORD: json.dumps(record)}
    write_files(
        {
            path: lambda temporary: save_file(shared, temporary, metadata={"format": "pt"}),
            folder / f"{name}.safetensors": lambda temporary: save_file(own, temporary, metadata=metadata),
        }
    )


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of two and more dimensions as int8 with a scale for each index of the first; others in float16 or as is.

    Running means and variances stay in float32, which they may need.
    """
    packed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if tensor.dim() < 2 or not tensor.is_floating_point():
            small = tensor.is_floating_point() and "running" not in key
            packed[key] = (tensor.half() if small else tensor).contiguous()
            continue
        largest = tensor.float().flatten(1).abs().amax(1).clamp(min=1e-12)
        scale = largest / 127
        shape = (-1, *[1] * (tensor.dim() - 1))
        packed[key] = (tensor.float() / scale.view(shape)).round().clamp(-127, 127).to(torch.int8)
        packed[key + _SCALE] = scale
    return packed


@contextmanager
def unpacked_folder(folder: Path) -> Iterator[Path]:
    """A folder that transformers can read: this one, or for packed weights a copy that lasts as long as the context."""
    weights = folder / WEIGHTS_NAME
    packed = reader.read_file(weights).tensors if weights.is_file() else {}
    if not any(tensor.dtype == torch.int8 for tensor in packed.values()):
        yield folder
        return
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix="vpd-fast-") as scratch:
        shutil.copyfile(folder / CONFIG_NAME, Path(scratch) / CONFIG_NAME)
        save_file(unpack(packed), Path(scratch) / WEIGHTS_NAME, metadata={"format": "pt"})
        yield Path(scratch)


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `pack`, in float32, up to rounding."""
    tensors = {}
    for key, tensor in packed.items():
        if tensor.dtype == torch.int8:
            scale = packed[key + _SCALE]
            tensors[key] = tensor.float() * scale.view(-1, *[1] * (tensor.dim() - 1))
        elif not (key.endswith(_SCALE) and key.removesuffix(_SCALE) in packed):
            tensors[key] = tensor.float() if tensor.is_floating_point() else tensor.clone()
    return tensors
