"""Fast models on disk: engine.json says what the layers are, engine.safetensors holds their tensors."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vpd_fast.config import VPDConfig
from vpd_fast.engine.build import LayerInfo
from vpd_fast.engine.layers import Conv2d, GemmLayer, GroupNorm, Layer, Winograd, from_parts
from vpd_fast.engine.model import FastVPD
from vpd_fast.engine.policy import NAMES
from vpd_fast.engine.specs import layer_specs
from vpd_fast.errors import CheckpointError
from vpd_fast.files import as_path, write_files, write_json
from vpd_fast.models.vpd import VPD
from vpd_fast.ops.packing import ROWS_ONLY

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
SETTINGS, TENSORS = "engine.json", "engine.safetensors"
CONDITIONING = "conditioning"


def save_engine(model: FastVPD, folder: str | Path) -> None:
    """Write a fast model; `load_engine` reads it back.

    Nothing half-written stays behind. Raises CheckpointError if the folder cannot be written.
    """
    folder = as_path(folder, "folder")
    tensors = {f"{CONDITIONING}:{name}": t for name, t in model.state_dict().items()}
    settings: dict[str, Any] = {
        "format": FORMAT,
        "precision": model.precision,
        "config": model.config.to_dict(),
        "report": [asdict(info) for info in model.infos],
        "layers": {},
    }
    for name, layer in model.layers.items():
        layer = layer.for_device(torch.device("cpu"))  # one layout in all files
        settings["layers"][name] = {"kind": layer.kind} | layer.settings()
        tensors |= {f"{name}:{part}": t for part, t in layer.tensors().items()}
    contiguous = {name: t.contiguous() for name, t in tensors.items()}
    write_files(
        {
            folder / TENSORS: lambda path: save_file(contiguous, path),
            folder / SETTINGS: lambda path: write_json(path, settings),
        },
        CheckpointError,
    )


def load_engine(folder: str | Path, device: torch.device | str = "cpu") -> FastVPD:
    """The fast model that `save` wrote into `folder`: ready to run, without the weights it was made from.

    On the CPU the tensors stay in the file and are read as they are used. An engine runs on the kind of device that it
    was made on; one that was made with Policy(winograd=False) runs on both. Raises CheckpointError if the folder is no
    engine, or one for another device.
    """
    folder = as_path(folder, "folder")
    settings = _read_settings(folder)
    try:
        config = VPDConfig.from_dict(settings["config"])
        tensors = _read_tensors(folder / TENSORS)
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition(":")
            parts.setdefault(name, {})[part] = tensor
        conditioning = parts.pop(CONDITIONING)
        layers = {}
        for name, values in settings["layers"].items():
            layers[name] = from_parts(values.pop("kind"), values, parts.pop(name))
        if parts:
            raise ValueError(f"{TENSORS} has layers that {SETTINGS} does not know: {', '.join(list(parts)[:3])}")
        _require_layers(config, layers)
        infos = tuple(LayerInfo(**row) for row in settings["report"])
        device = torch.device(device)
        _require_device(layers, device)
        layers = {name: layer.for_device(device) for name, layer in layers.items()}
        conditioning = {name: t.to(device) for name, t in conditioning.items()}
        return FastVPD(config, conditioning, layers, infos, settings["precision"])
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder}: {SETTINGS} and {TENSORS} do not fit together ({error})") from error


def _require_layers(config: VPDConfig, layers: dict[str, Layer]) -> None:
    """Raises ValueError unless these are the layers of such a model, with weights of its sizes."""
    specs = {spec.name: spec for spec in layer_specs(VPD.empty(config))}
    if specs.keys() != layers.keys():
        different = ", ".join(sorted(specs.keys() ^ layers.keys())[:3])
        raise ValueError(f"the layers are not those of the configuration; {different}, ...")
    for name, spec in specs.items():
        layer, shape = layers[name], tuple(spec.make()[0].shape)
        if isinstance(layer, GemmLayer):
            positions = 1
            if isinstance(layer, Conv2d):
                positions = 4 if layer.upsample else math.prod(shape[2:])
            shape, sizes = (shape[0], positions * shape[1]), (layer.weight.n, layer.weight.k)
        else:
            sizes = tuple(layer.tensors()["weight"].shape)
        if (spec.kind == "group_norm") != isinstance(layer, GroupNorm) or sizes != shape:
            raise ValueError(f"layer {name} is {layer.kind} {sizes}, expected {spec.kind} {shape}")


def _require_device(layers: dict[str, Layer], device: torch.device) -> None:
    """Raises ValueError if a layer has no kernel there."""
    if device.type != "cpu" and any(isinstance(layer, Winograd) for layer in layers.values()):
        raise ValueError("it has Winograd layers, which run on CPUs; optimize with Policy(winograd=False)")
    weights = {name: layer.weight.dtype for name, layer in layers.items() if isinstance(layer, GemmLayer)}
    for name, dtype in weights.items():
        if device.type == "cpu" and dtype in ROWS_ONLY:
            raise ValueError(f"layer {name} is {NAMES[dtype]}, which CPUs have no kernels for")


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"), object_hook=_with_tuples)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{folder} is no saved engine: it has no {SETTINGS}; save one with fast.save()"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        got = settings.get("format") if isinstance(settings, dict) else settings
        raise CheckpointError(f"{path}: expected format {FORMAT} of an engine, got {got!r}; optimize the model again")
    return settings


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from error
