"""Fast models on disk: engine.json says what the layers are, engine.safetensors holds their tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vpd_fast.checkpoints.checksums import checksums, require_intact
from vpd_fast.checkpoints.reader import read_file
from vpd_fast.config import VPDConfig
from vpd_fast.engine.build import LayerInfo
from vpd_fast.engine.layers import Conv2d, GemmLayer, GroupNorm, Layer, Linear, Winograd, from_parts
from vpd_fast.engine.model import FastVPD
from vpd_fast.engine.policy import ACTIVATIONS, NAMES
from vpd_fast.engine.specs import Spec, layer_specs
from vpd_fast.errors import CheckpointError, brief
from vpd_fast.fields import build
from vpd_fast.files import (
    CHECKSUMS,
    ENGINE_NAME,
    ENGINE_WEIGHTS_NAME,
    as_path,
    read_json_object,
    write_files,
    write_json,
)
from vpd_fast.hub import local_path
from vpd_fast.models.finite import all_finite, why_not_finite
from vpd_fast.models.vpd import VPD
from vpd_fast.ops.packing import ROWS_ONLY

FORMAT = 1
SETTINGS, TENSORS = ENGINE_NAME, ENGINE_WEIGHTS_NAME
CONDITIONING = "conditioning"
_MAX_REASON = 300


def save_engine(model: FastVPD, folder: str | Path) -> None:
    """Write a fast model, with check sums of its tensors; `load_engine` reads it back.

    Nothing half-written stays behind. Raises CheckpointError if the folder cannot be written.
    """
    folder = as_path(folder, "folder")
    tensors = {f"{CONDITIONING}:{name}": t for name, t in model.state_dict().items()}
    settings: dict[str, Any] = {
        "format": FORMAT,
        "precision": model.precision,
        "config": model.config.to_dict(),
        "report": [_row(info) for info in model.infos],
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
            folder / SETTINGS: lambda path: write_json(path, settings | {CHECKSUMS: checksums(contiguous)}),
        },
        CheckpointError,
    )


def _row(info: LayerInfo) -> dict[str, Any]:
    row = asdict(info)
    exact = info.snr_db is not None and not math.isfinite(info.snr_db)  # no noise at all, which JSON has no number for
    return row | {"snr_db": None} if exact else row


def load_engine(
    folder: str | Path,
    device: torch.device | str = "cpu",
    *,
    mmap: bool = True,
    verify: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> FastVPD:
    """The fast model that `save` wrote into `folder`, or that a repository of the hub ("owner/name") has: ready to run,
    without the weights it was made from.

    On the CPU the tensors stay in the file and are read as they are used, so that it must be replaced by another file,
    not overwritten in place, while the model lives; mmap=False reads them into memory. An engine runs on the kind of
    device that it was made on; one that was made with Policy(winograd=False) runs on both. verify: compare the tensors
    with the check sums that were written with them. revision, token, cache_dir, local_files_only: of the hub, as
    `vpd_fast.hub.local_path` takes them. Raises CheckpointError if the folder is no engine, a damaged one, or one for
    another device.
    """
    folder = local_path(folder, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    settings = _read_settings(folder)
    if verify:
        require_intact(folder, SETTINGS)
    try:
        config = VPDConfig.from_dict(settings["config"])
        _require_count(config, settings["layers"])
        tensors = _read_tensors(folder / TENSORS, mmap)
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition(":")
            parts.setdefault(name, {})[part] = tensor
        conditioning = parts.pop(CONDITIONING)
        layers = {}
        for name, values in settings["layers"].items():
            layers[name] = from_parts(values["kind"], _layer_settings(values), parts.pop(name))
        if parts:
            raise ValueError(f"{TENSORS} has layers that {SETTINGS} does not know: {', '.join(list(parts)[:3])}")
        model = VPD.empty(config)
        _require_layers(model, layers, ACTIVATIONS[settings["precision"]])
        _require_conditioning(model, conditioning)
        infos = tuple(build(LayerInfo, row, "report", strict=True) for row in settings["report"])
        device = torch.device(device)
        _require_device(layers, device)
        layers = {name: layer.for_device(device) for name, layer in layers.items()}
        conditioning = {name: t.to(device) for name, t in conditioning.items()}
        return FastVPD(config, conditioning, layers, infos, settings["precision"])
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        reason = str(error)[:_MAX_REASON]
        raise CheckpointError(f"{folder}: {SETTINGS} and {TENSORS} do not fit together ({reason})") from error


def _require_count(config: VPDConfig, layers: Mapping[str, Any]) -> None:
    """Raises ValueError for so few layers that a model of that configuration need not be laid out."""
    backbone = config.backbone
    least = len(backbone.channel_mult) * (2 * backbone.num_res_blocks + backbone.vae_num_res_blocks)
    if not isinstance(layers, dict) or len(layers) < least:
        raise ValueError(f"{len(layers)} layers; a model of this configuration has more than {least}")


def _require_layers(model: VPD, layers: dict[str, Layer], out_dtype: torch.dtype) -> None:
    """Raises ValueError unless these are the layers of such a model: settings, sizes of tensors, and finite numbers."""
    specs = {spec.name: spec for spec in layer_specs(model)}
    if specs.keys() != layers.keys():
        different = ", ".join(sorted(specs.keys() ^ layers.keys())[:3])
        raise ValueError(f"the layers are not those of the configuration; {different}, ...")
    for name, spec in specs.items():
        layer, (weight, bias) = layers[name], spec.make()
        shape = tuple(weight.shape)
        if isinstance(layer, GemmLayer):
            positions = 1
            if isinstance(layer, Conv2d):
                positions = 4 if layer.upsample else math.prod(shape[2:])
            rows = (shape[0], positions * shape[1])
            found = layer.weight.n, layer.weight.k
        else:
            rows, found = shape, tuple(layer.tensors()["weight"].shape)
        expected_kind = {"group_norm": GroupNorm, "linear": Linear}.get(spec.kind, (Conv2d, Winograd))
        if not isinstance(layer, expected_kind) or found != rows:
            raise ValueError(f"layer {name} is {layer.kind} {found}, expected {spec.kind} {rows}")
        for setting, value in _expected_settings(spec, layer, shape, out_dtype).items():
            found = getattr(layer, setting)
            if type(found) is not type(value) or found != value:
                raise ValueError(f"layer {name}: {setting} is {brief(found)}, expected {brief(value)}")
        if not spec.static_rows and getattr(layer, "input_rounding", None) is not None:
            raise ValueError(f"layer {name} has an input_rounding, but nothing rounds its input")
        _require_tensors(name, layer, shape, bias is not None)


def _expected_settings(spec: Spec, layer: Layer, shape: tuple[int, ...], out_dtype: torch.dtype) -> dict[str, Any]:
    """Return what `build_layer` makes of a specification, but for the weight and other tensors."""
    settings = dict(spec.settings)
    if isinstance(layer, Winograd) or spec.upsample:
        settings = {key: value for key, value in settings.items() if key not in ("stride", "padding")}
        settings["upsample"] = spec.upsample
    if isinstance(layer, Conv2d):
        phases = {"kernel": (2, 2), "padding": (0, 0, 0, 0), "stride": 1}
        settings |= phases if spec.upsample else {"kernel": shape[2:]}
    tensors = ("scale", "input_rounding")
    defaults = {f.name: f.default for f in fields(layer) if f.default is not MISSING and f.name not in tensors}
    return defaults | settings | ({"out_dtype": out_dtype} if isinstance(layer, GemmLayer) else {})


def _require_tensors(name: str, layer: Layer, shape: tuple[int, ...], has_bias: bool) -> None:
    """Raises ValueError unless a layer's vectors have its sizes, its weight the right number of matrices, and all are
    finite."""
    if isinstance(layer, GemmLayer):
        counts = (1,)
        if isinstance(layer, Conv2d):
            counts = (4,) if layer.upsample else (1,)
        elif isinstance(layer, Winograd):
            counts = (9,) if layer.upsample else (16, 36)
        if layer.weight.matrices not in counts:
            raise ValueError(f"layer {name}: its weight has {layer.weight.matrices} matrices, expected {counts}")
        sizes = {"bias": shape[:1] if has_bias else None, "scale": shape[1:2]}
        if isinstance(layer, Linear):
            sizes["input_rounding"] = (2, shape[1])
    else:
        sizes = {"bias": shape[:1], "weight": shape[:1]}
    for part, size in sizes.items():
        vector = getattr(layer, part)
        if vector is None and (part in ("scale", "input_rounding") or size is None):
            continue
        if not isinstance(vector, Tensor) or tuple(vector.shape) != size or vector.dtype != torch.float32:
            found = "missing" if vector is None else f"{vector.dtype} {tuple(vector.shape)}"
            raise ValueError(f"layer {name}: its {part} is {found}, expected float32 {size}")
    for part, tensor in layer.tensors().items():
        if not all_finite(tensor):
            raise ValueError(f"layer {name}: its {part} {why_not_finite(tensor, tensor)}")


def _require_conditioning(model: VPD, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless these are the weights of the plain model that no layer replaces."""
    expected = {key: t for key, t in model.state_dict().items() if FastVPD.is_conditioning(model.config, key)}
    if expected.keys() != tensors.keys():
        different = ", ".join(sorted(expected.keys() ^ tensors.keys())[:3])
        raise ValueError(f"the weights beside the layers are others than expected; {different}, ...")
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape or tensor.dtype != torch.float32:
            found, wanted = tuple(tensor.shape), tuple(expected[key].shape)
            raise ValueError(f"{key} is {tensor.dtype} {found}, expected float32 {wanted}")
        if not all_finite(tensor):
            raise ValueError(f"{key} {why_not_finite(tensor, tensor)}")


def _require_device(layers: dict[str, Layer], device: torch.device) -> None:
    """Raises ValueError if a layer has no kernel there."""
    if device.type != "cpu" and any(isinstance(layer, Winograd) for layer in layers.values()):
        raise ValueError("it has Winograd layers, which run on CPUs; optimize with Policy(winograd=False)")
    weights = {name: layer.weight.dtype for name, layer in layers.items() if isinstance(layer, GemmLayer)}
    for name, dtype in weights.items():
        if device.type == "cpu" and dtype in ROWS_ONLY:
            raise ValueError(f"layer {name} is {NAMES[dtype]}, which CPUs have no kernels for")


def _layer_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    named = {key: value for key, value in values.items() if key != "kind"}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in named.items()}


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    try:
        settings = read_json_object(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{folder} is no saved engine: it has no {SETTINGS}; save one with fast.save()"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not a JSON file of settings ({error})") from error
    if settings.get("format") != FORMAT:
        got = brief(settings.get("format"))
        raise CheckpointError(f"{path}: expected format {FORMAT} of an engine, got {got}; optimize the model again")
    return settings


def _read_tensors(path: Path, mmap: bool) -> dict[str, Tensor]:
    try:
        return read_file(path, mmap=mmap).tensors
    except CheckpointError as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from error
