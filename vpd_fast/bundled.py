"""Weights that come with the package: miniatures trained on the shapes world (`vpd_fast.data.shapes`).

The folder vpd_fast/assets has NAME.safetensors with 8-bit weights, one scale per output channel; what all models have
in common, the KL encoder, is in a file of its own; shapes-text/ is their CLIP text encoder. They are made by
examples/shapes/pack.py, and their metadata say with which settings and how good they are. This module names, finds and
unpacks them; `vpd_fast.checkpoints` opens them as checkpoints.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from vpd_fast.errors import CheckpointError
from vpd_fast.files import CONFIG_NAME, WEIGHTS_NAME, as_path

ASSETS = Path(__file__).parent / "assets"
NAMES = ("shapes-segmentation", "shapes-referring", "shapes-depth")
TEXT_ENCODER = "shapes-text"
SHARED = "shapes-encoder"
RECORD = "record"  # metadata entry: how the weights were made and measured
_SCALE = ".scale"


def is_bundled(path: str | Path) -> bool:
    """Return whether this names bundled weights or the bundled text encoder, and no file or folder with weights.

    Other folders of that name, of training runs for example, do not hide what comes with the package.
    """
    path = as_path(path, "path")
    if str(path) not in (*NAMES, TEXT_ENCODER) or path.is_file():
        return False
    return not any((path / name).exists() for name in (CONFIG_NAME, WEIGHTS_NAME, "text_encoder", "unet"))


def asset(name: str) -> Path:
    """Return the file or folder of a bundled name. Raises CheckpointError where it is missing."""
    path = ASSETS / (name if name == TEXT_ENCODER else f"{name}.safetensors")
    if not (path / "text_encoder" / WEIGHTS_NAME if name == TEXT_ENCODER else path).is_file():
        raise CheckpointError(
            f"{name}: these weights come with the package, but {path} is missing; in a source checkout "
            "examples/shapes/make.sh makes them, in about three hours on two cores"
        )
    return path


def pack(tensors: Mapping[str, Tensor], step: float | None = None) -> dict[str, Tensor]:
    """Quantise weights of two and more dimensions to int8, one scale per index of the first; others become float16.

    Integers stay as they are, and running means and variances stay in float32, which they may need.

    step: the scale relative to the root mean square of its weights. Larger steps make a file that a wheel or a zip
        archive compresses further. None: the smallest scale that 8 bits allow, 1/127 of the largest weight.
    """
    packed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if tensor.dim() < 2 or not tensor.is_floating_point():
            small = tensor.is_floating_point() and "running" not in key
            packed[key] = (tensor.half() if small else tensor).contiguous()
            continue
        rows = tensor.float().flatten(1)
        scale = rows.abs().amax(1).clamp(min=1e-12) / 127
        if step is not None:
            scale = torch.maximum(scale, rows.square().mean(1).sqrt() * step)
        shape = (-1, *[1] * (tensor.dim() - 1))
        packed[key] = (tensor.float() / scale.view(shape)).round().clamp(-127, 127).to(torch.int8)
        packed[key + _SCALE] = scale
    return packed


def pack_model(
    tensors: Mapping[str, Tensor], root: str, step: float | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Pack the shared encoder (keys without their `root`) with all 8 bits, and the rest of a model with `step`."""
    shared = {key[len(root) :]: tensor for key, tensor in tensors.items() if key.startswith(root)}
    return pack(shared), pack({key: tensor for key, tensor in tensors.items() if not key.startswith(root)}, step)


@contextmanager
def unpacked_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder that transformers can read: this one, or for packed weights a copy that lasts as long as this."""
    from safetensors.torch import load_file, save_file

    weights = folder / WEIGHTS_NAME
    packed = load_file(weights) if weights.is_file() else {}
    if not any(tensor.dtype == torch.int8 for tensor in packed.values()):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="vpd-fast-") as scratch:
        shutil.copyfile(folder / CONFIG_NAME, Path(scratch) / CONFIG_NAME)
        save_file(unpack(packed), Path(scratch) / WEIGHTS_NAME, metadata={"format": "pt"})
        yield Path(scratch)


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Invert `pack`, up to rounding; the weights are float32."""
    tensors = {}
    for key, tensor in packed.items():
        if tensor.dtype == torch.int8:
            scale = packed[key + _SCALE]
            tensors[key] = tensor.float() * scale.view(-1, *[1] * (tensor.dim() - 1))
        elif not (key.endswith(_SCALE) and key.removesuffix(_SCALE) in packed):
            tensors[key] = tensor.float() if tensor.is_floating_point() else tensor.clone()
    return tensors
