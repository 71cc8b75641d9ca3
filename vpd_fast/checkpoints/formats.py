"""Recognises what a file or folder holds and brings its tensors to one of two naming schemes.

VPD models: the names of the released checkpoints. Stable Diffusion: the names of its original .ckpt files ("ldm").
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vpd_fast import bundled
from vpd_fast.checkpoints import ldm_diffusers, reader
from vpd_fast.checkpoints.checkpoint import CONFIG_KEY, LDM_TEXT, LDM_UNET, LDM_VAE, Checkpoint
from vpd_fast.checkpoints.infer import ENCODER, UNET, infer_task
from vpd_fast.checkpoints.limits import MAX_NAME
from vpd_fast.checkpoints.mapped import MappedFile, copied
from vpd_fast.checkpoints.names import below, choose_root, ldm_averages, roots, without_root
from vpd_fast.checkpoints.pickles import Placeholder
from vpd_fast.config import VPDConfig
from vpd_fast.errors import CheckpointError, brief
from vpd_fast.files import CONFIG_NAME, WEIGHTS_NAME, as_path, find_weights, parse_json
from vpd_fast.tasks import TASKS

# Prefixes of the depth model as ported to mmsegmentation 1.x -> prefixes in the released depth checkpoint.
_AVERAGED_UNET = "unet_ema"  # where diffusers' training scripts put it
_NO_AVERAGES = "no averages of the weights (EMA) beside them; load the weights themselves"
_MMSEG_SIGNATURE = "decode_head.depth_pred_layer.0.weight"
_SIGNATURES = (
    *(task.signature for task in TASKS.values()),
    (_MMSEG_SIGNATURE,),
    (f"{LDM_UNET}input_blocks.0.0.weight",),
    (f"{LDM_VAE}encoder.conv_in.weight",),
)
_MMSEG_PREFIXES = {
    "backbone.": "encoder.",
    "decode_head.conv1.": "encoder.layer1.",
    "decode_head.conv2.": "encoder.layer2.0.",
    "decode_head.conv_aggregation.": "encoder.out_layer.",
    "decode_head.decoder.": "decoder.",
    "decode_head.depth_pred_layer.": "last_layer_depth.",
}


def open_checkpoint(path: str | Path, *, mmap: bool = True, ema: bool = False) -> Checkpoint:
    """Open a file or folder of any supported format, or bundled weights by their name; `mmap` as in `reader.read_file`.

    ema: the averages over the training (EMA), which some files have beside the weights. Raises CheckpointError,
    also where there are none.
    """
    checkpoint = _open(as_path(path, "path"), ema)
    if not mmap:
        checkpoint.tensors = {key: copied(tensor, checkpoint.files) for key, tensor in checkpoint.tensors.items()}
        checkpoint.files = ()
    return checkpoint


def _open(path: Path, ema: bool) -> Checkpoint:
    if ema and (bundled.is_bundled(path) or (path / WEIGHTS_NAME).is_file()):
        raise CheckpointError(f"{path}: {_NO_AVERAGES}")
    if bundled.is_bundled(path):
        return open_bundled(str(path))
    if path.is_dir():
        return _open_folder(path, ema)
    raw = reader.read_file(path, ema=ema)
    raw.tensors = _model_in(raw, ema and not raw.averaged)
    checkpoint = Checkpoint(path, _format_of(raw), raw.tensors, placeholders=raw.placeholders, skipped=raw.skipped)
    checkpoint.files = raw.files
    if checkpoint.format == "mmseg":
        checkpoint.tensors = _from_mmseg(raw.tensors)
    meta = raw.metadata.get("meta")
    stored = raw.metadata.get(CONFIG_KEY) or (meta.get(CONFIG_KEY) if isinstance(meta, dict) else None)
    if stored is not None and checkpoint.format == "vpd":
        checkpoint.config = _parse_config(stored, path)
    checkpoint.metadata = _known_metadata(raw.metadata)
    checkpoint.contents = tuple(sorted(set(raw.metadata) - {CONFIG_KEY, "format"}))
    return checkpoint


def _model_in(raw: reader.RawFile, ema: bool) -> dict[str, Tensor]:
    """Return the tensors by the names of a known model, without what a framework put before them."""
    try:
        found = roots(raw.tensors, _SIGNATURES)
        averaged = choose_root(found, True) if ema else None
        averages = {} if averaged is None else below(raw.tensors, averaged)
        others = {
            key: tensor for key, tensor in raw.tensors.items() if averaged is None or not key.startswith(averaged)
        }
        root = choose_root([root for root in found if root != averaged], False)
        tensors = without_root(others, root) if root else others
        averages = averages or (ldm_averages(tensors, LDM_UNET) if ema else {})
        if ema and not averages:
            raise CheckpointError(_NO_AVERAGES)
        return {**tensors, **averages}  # buffers may have no averages
    except CheckpointError as error:
        raise CheckpointError(f"{raw.path}: {error}") from error


def is_backbone(key: str) -> bool:
    """Return whether a VPD name belongs to the UNet or the autoencoder."""
    return key.removeprefix("encoder.").startswith((UNET, ENCODER))


def vpd_to_ldm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the UNet and autoencoder of a VPD model to ldm's names."""
    renamed = {}
    for key, tensor in tensors.items():
        inner = key.removeprefix("encoder.")
        for ours, theirs in ((UNET, LDM_UNET), (ENCODER, LDM_VAE)):
            if inner.startswith(ours):
                renamed[theirs + inner[len(ours) :]] = tensor
    return renamed


def ldm_to_vpd(tensors: Mapping[str, Tensor], task: str) -> dict[str, Tensor]:
    """Invert `vpd_to_ldm`; other tensors keep their names."""
    root = TASKS[task].key_prefix
    renamed = {}
    for key, tensor in tensors.items():
        for ours, theirs in ((UNET, LDM_UNET), (ENCODER, LDM_VAE)):
            if key.startswith(theirs):
                key = root + ours + key[len(theirs) :]
                break
        renamed[key] = tensor
    return renamed


def _from_mmseg(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the port's tensors to the released names. Its 28th embedding, the mean of the 27 scenes, stays a scene."""
    renamed = {}
    for key, tensor in tensors.items():
        prefix = next((p for p in _MMSEG_PREFIXES if key.startswith(p)), "")
        renamed[_MMSEG_PREFIXES.get(prefix, "") + key[len(prefix) :]] = tensor
    return renamed


def _format_of(raw: reader.RawFile) -> str:
    keys = raw.tensors
    shapes = {key: tuple(tensor.shape) for key, tensor in keys.items()}
    if _MMSEG_SIGNATURE in keys:
        return "mmseg"
    if infer_task(shapes) is not None:
        return "vpd"
    if any(key.startswith((LDM_UNET, LDM_VAE)) for key in keys):
        return "ldm"
    names = ", ".join(key[:100] for key in list(keys)[:4])
    if "encoder.conv_in.weight" in keys and "decoder.conv_in.weight" in keys:
        raise CheckpointError(f"{raw.path}: a VAE alone; expected Stable Diffusion with its UNet, or a VPD model")
    if "down_blocks.0.resnets.0.norm1.weight" in keys or "encoder.down_blocks.0.resnets.0.norm1.weight" in keys:
        raise CheckpointError(
            f"{raw.path}: one network of a diffusers model; expected the folder that has unet/ and vae/ inside"
        )
    raise CheckpointError(
        f"{raw.path}: neither a VPD model nor Stable Diffusion 1.x; its {len(keys)} tensors begin with {names}"
    )


def _known_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the class names of mmcv and mmengine files and the maximum depth of depth files' arguments."""
    known: dict[str, Any] = {}
    meta = metadata.get("meta")
    if isinstance(meta, dict):
        dataset = meta.get("dataset_meta")
        names = meta.get("CLASSES") or (dataset.get("classes") if isinstance(dataset, dict) else None)
        if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
            known["class_names"] = tuple(names)
    arguments = metadata.get("args")
    values = arguments.state if isinstance(arguments, Placeholder) else arguments
    max_depth = values.get("max_depth") if isinstance(values, dict) else None
    if isinstance(max_depth, (int, float)) and 0 < max_depth < 1e9:
        known["max_depth"] = float(max_depth)
    return known


def _parse_config(values: Any, path: Path) -> VPDConfig:
    try:
        return VPDConfig.from_dict(parse_json(values) if isinstance(values, str) else values)
    except ValueError as error:  # InputError is one
        raise CheckpointError(f"{path}: its stored configuration is not valid: {error}") from error


def open_bundled(name: str) -> Checkpoint:
    """Open bundled weights, unpacked to float32; `metadata` has their record. Raises CheckpointError."""
    if name == bundled.TEXT_ENCODER:
        raise CheckpointError(f"{name} is a text encoder; expected one of {', '.join(bundled.NAMES)}")
    own, shared = (reader.read_file(bundled.asset(part)) for part in (name, bundled.SHARED))
    try:
        config = VPDConfig.from_dict(parse_json(own.metadata[CONFIG_KEY]))
        record = dict(parse_json(own.metadata[bundled.RECORD]))
        tensors = {
            f"{config.key_prefix}{ENCODER}{key}": tensor for key, tensor in bundled.unpack(shared.tensors).items()
        }
        tensors |= bundled.unpack(own.tensors)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{own.path} or {shared.path.name} is damaged ({error}); expected what examples/shapes/pack.py writes"
        ) from error
    return Checkpoint(Path(name), "bundled", tensors, config, {bundled.RECORD: record})


def _open_folder(folder: Path, ema: bool) -> Checkpoint:
    if (folder / "unet").is_dir() or (folder / _AVERAGED_UNET).is_dir():
        return _open_diffusers(folder, ema)
    if (folder / WEIGHTS_NAME).is_file() and (folder / CONFIG_NAME).is_file():
        config = _parse_config(reader.read_json(folder / CONFIG_NAME), folder / CONFIG_NAME)
        raw = reader.read_file(folder / WEIGHTS_NAME)
        return Checkpoint(folder, "pretrained", raw.tensors, config, files=raw.files)
    present = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
    raise CheckpointError(
        f"{folder}: expected {CONFIG_NAME} and {WEIGHTS_NAME} (save_pretrained) or unet/ and vae/ (diffusers); "
        f"found {present}"
    )


def _open_diffusers(folder: Path, ema: bool) -> Checkpoint:
    part = folder / (_AVERAGED_UNET if ema else "unet")
    if ema and not part.is_dir():
        raise CheckpointError(f"{folder}: {_NO_AVERAGES} (they would be in {_AVERAGED_UNET}/)")
    unet, files = _diffusers_tensors(part, "diffusion_pytorch_model")
    if not (folder / "vae").is_dir():
        raise CheckpointError(f"{folder}: has no vae/, the VAE that encodes images; expected it beside unet/")
    vae, more = _diffusers_tensors(folder / "vae", "diffusion_pytorch_model")
    files += more
    try:
        layout = ldm_diffusers.Layout.of_diffusers(unet, vae)
        tensors = _prefixed(LDM_UNET, ldm_diffusers.unet_from_diffusers(unet, layout))
        tensors |= _prefixed(LDM_VAE, ldm_diffusers.vae_from_diffusers(vae, layout))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    parts = {p.name for p in folder.iterdir() if p.is_dir()} - {"unet", "vae", _AVERAGED_UNET}
    if (folder / "text_encoder").is_dir():
        text, more = _diffusers_tensors(folder / "text_encoder", "model")
        files += more
        # transformers 5 leaves this prefix out of the files it writes.
        tensors |= _prefixed(LDM_TEXT + "text_model.", {k.removeprefix("text_model."): v for k, v in text.items()})
        parts.discard("text_encoder")
    metadata = {}
    if (part / CONFIG_NAME).is_file():
        metadata["num_heads"] = _heads(part / CONFIG_NAME)
    return Checkpoint(folder, "diffusers", tensors, metadata=metadata, contents=tuple(sorted(parts)), files=files)


def _heads(path: Path) -> int:
    """Return the number of attention heads in the configuration of diffusers' UNet."""
    values = reader.read_json(path)
    # In SD 1.x's configurations `attention_head_dim` is that number, whatever its name says.
    given = [values[name] for name in ("num_attention_heads", "attention_head_dim") if values.get(name) is not None]
    heads = given[0] if given else 8
    if isinstance(heads, list) and heads and all(item == heads[0] for item in heads):
        heads = heads[0]
    if type(heads) is not int or heads < 1:
        raise CheckpointError(
            f"{path}: attention_head_dim is {brief(heads)}, expected one int as in Stable Diffusion 1.x"
        )
    return heads


def _diffusers_tensors(folder: Path, stem: str) -> tuple[dict[str, Tensor], tuple[MappedFile, ...]]:
    """Read the tensors of one sub-folder, whole or in shards, and return with them the files that they lie in."""
    found = find_weights(folder, stem)
    if found is None:
        raise CheckpointError(
            f"{folder}: expected {stem}.safetensors or .bin (also .fp16 or in shards) and found neither"
        )
    if found.path.suffix == ".json":
        return _read_shards(found.path)
    raw = reader.read_file(found.path)
    return raw.tensors, raw.files


def _read_shards(index: Path) -> tuple[dict[str, Tensor], tuple[MappedFile, ...]]:
    names = reader.read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(map(_is_file_name, names.values())):
        raise CheckpointError(f"{index}: no weight_map of file names in the same folder")
    shards = [reader.read_file(index.parent / name) for name in dict.fromkeys(names.values())]
    tensors = {key: tensor for raw in shards for key, tensor in raw.tensors.items()}
    return tensors, tuple(file for raw in shards for file in raw.files)


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and value == Path(value).name


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in tensors.items()}
