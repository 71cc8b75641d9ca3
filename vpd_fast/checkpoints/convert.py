"""Conversion between VPD files, folders of this package, and Stable Diffusion in the ldm and diffusers formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpd_fast.checkpoints import ldm_diffusers, reader
from vpd_fast.checkpoints.checkpoint import CONFIG_KEY, LDM_TEXT, LDM_UNET, LDM_VAE, Checkpoint
from vpd_fast.checkpoints.formats import is_backbone, open_checkpoint, vpd_to_ldm
from vpd_fast.checkpoints.load import empty_model, match_weights, raise_missing, vpd_config
from vpd_fast.checkpoints.report import ConvertReport, unused_reason
from vpd_fast.checkpoints.save import pretrained_writers, write_safetensors
from vpd_fast.config import BackboneConfig, VPDConfig
from vpd_fast.errors import CheckpointError, InputError
from vpd_fast.files import CONFIG_NAME, WEIGHTS_NAME, Writer, as_path, write_files, write_json
from vpd_fast.hub import local_path

TARGETS = ("pretrained", "vpd", "ldm", "diffusers")
_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"

Writers = dict[Path, Writer]


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str,
    dtype: torch.dtype | None = None,
    ema: bool = False,
    **config_overrides: Any,
) -> ConvertReport:
    """Read any checkpoint, also one of the hub ("owner/name"), and write it in another format.

    to: "pretrained" (folder of this package), "vpd" (file like the released ones; .safetensors by its suffix), "ldm"
    (file with Stable Diffusion's original names; .safetensors by its suffix) or "diffusers" (folder with unet/, vae/,
    and text_encoder/ where the source has one). A VPD model can become any of them, Stable Diffusion only the last two.
    dtype: of floating tensors, None: unchanged. ema, config_overrides: as in `load_checkpoint`. Files appear when
    complete. Raises CheckpointError (unreadable source, impossible conversion, destination not writable), InputError.
    """
    if to not in TARGETS:
        raise InputError(f"convert: to must be one of {', '.join(TARGETS)}, got {to!r}")
    destination = as_path(destination, "destination")
    checkpoint = open_checkpoint(local_path(source), ema=ema)
    report = ConvertReport(checkpoint.path, destination, checkpoint.format, to, placeholders=checkpoint.placeholders)
    make_writers = _vpd_writers if to in ("pretrained", "vpd") else _stable_diffusion_writers
    write_files(make_writers(checkpoint, report, dtype, config_overrides), CheckpointError)
    return report


def _vpd_writers(
    checkpoint: Checkpoint, report: ConvertReport, dtype: torch.dtype | None, overrides: Mapping[str, Any]
) -> Writers:
    config = vpd_config(checkpoint, overrides)
    expected = empty_model(config, checkpoint.path).state_dict()
    taken, loading = match_weights(checkpoint, checkpoint.tensors, expected, config.task)
    raise_missing(loading)
    tensors = _converted(checkpoint.path, taken, dtype)
    report.written = list(tensors)
    report.dropped = dict(loading.ignored)
    if loading.unexpected:
        report.dropped["unknown to VPD"] = loading.unexpected
    if report.target_format == "pretrained":
        return pretrained_writers(report.destination, config, tensors)
    return _file_writer(report.destination, tensors, _released(tensors, config), config)


def _converted(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    converted = {key: reader.to_dtype(tensor, dtype) for key, tensor in tensors.items()}
    for key, tensor in converted.items():
        reader.require_finite(path, key, tensor, tensors[key])
    return converted


def _file_writer(
    path: Path, tensors: Mapping[str, Tensor], container: dict[str, Any], config: VPDConfig | None = None
) -> Writers:
    """Return the writer of one file: safetensors where its suffix says so, else `container` by torch.save."""
    if path.suffix == ".safetensors":
        return {path: lambda temporary: write_safetensors(temporary, tensors, config)}
    return {path: lambda temporary: torch.save(container, temporary)}


def _released(tensors: dict[str, Tensor], config: VPDConfig) -> dict[str, Any]:
    """Wrap tensors as in the released files; our configuration rides along where their loaders do not look."""
    stored = config.to_dict()
    if config.task == "segmentation":
        return {"meta": {"CLASSES": tuple(config.class_names), CONFIG_KEY: stored}, "state_dict": tensors}
    return {"model": tensors, CONFIG_KEY: stored}


def _stable_diffusion_writers(
    checkpoint: Checkpoint, report: ConvertReport, dtype: torch.dtype | None, overrides: Mapping[str, Any]
) -> Writers:
    if checkpoint.is_stable_diffusion:
        tensors, backbone = checkpoint.tensors, checkpoint.backbone(**overrides)
    else:
        tensors, backbone = vpd_to_ldm(checkpoint.tensors), vpd_config(checkpoint, overrides).backbone
        _drop(report, [key for key in checkpoint.tensors if not is_backbone(key)], "VPD's text adapter and head")
    tensors = _converted(checkpoint.path, tensors, dtype)
    _note_lacking(tensors, report)
    if report.target_format == "ldm":
        report.written = list(tensors)
        return _file_writer(report.destination, tensors, {"state_dict": tensors})
    return _diffusers_writers(tensors, backbone, report)


def _diffusers_writers(tensors: Mapping[str, Tensor], backbone: BackboneConfig, report: ConvertReport) -> Writers:
    parts: dict[str, dict[str, Tensor]] = {LDM_UNET: {}, LDM_VAE: {}, LDM_TEXT: {}}
    for key, tensor in tensors.items():
        prefix = next((p for p in parts if key.startswith(p) and ".loss." not in key), None)
        if prefix is None:
            _drop(report, [key], "no place in a diffusers folder")
        else:
            parts[prefix][key[len(prefix) :]] = tensor
    folder, layout = report.destination, ldm_diffusers.Layout.of_config(backbone)
    unet = ldm_diffusers.unet_to_diffusers(parts[LDM_UNET], layout)
    vae = ldm_diffusers.vae_to_diffusers(parts[LDM_VAE], layout)
    text = parts[LDM_TEXT]
    report.written = [f"unet/{k}" for k in unet] + [f"vae/{k}" for k in vae] + [f"text_encoder/{k}" for k in text]
    report.lacking.append("tokenizer, scheduler and model_index.json: they hold no weights")
    writers = {
        **_part(folder / "unet", _DIFFUSERS_WEIGHTS, unet, unet_config(backbone)),
        **_part(folder / "vae", _DIFFUSERS_WEIGHTS, vae, vae_config(backbone)),
    }
    if text:
        writers |= _part(folder / "text_encoder", WEIGHTS_NAME, text, _text_config(text))
    return writers


def _part(folder: Path, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Writers:
    return {
        folder / name: lambda path: write_safetensors(path, tensors),
        folder / CONFIG_NAME: lambda path: write_json(path, config),
    }


def _drop(report: ConvertReport, keys: list[str], otherwise: str) -> None:
    for key in keys:
        report.dropped.setdefault(unused_reason(key) or otherwise, []).append(key)


def _note_lacking(tensors: Mapping[str, Tensor], report: ConvertReport) -> None:
    for prefix, what in (
        (f"{LDM_UNET}out.", "the UNet's noise output (VPD has none): this file cannot generate images"),
        (f"{LDM_VAE}decoder.", "the image decoder (VPD has none): this file can encode images only"),
        (LDM_TEXT, "the text encoder"),
    ):
        if not any(key.startswith(prefix) for key in tensors):
            report.lacking.append(what)


def unet_config(backbone: BackboneConfig) -> dict[str, Any]:
    """Return diffusers' UNet2DConditionModel configuration of a backbone."""
    widths = [backbone.model_channels * m for m in backbone.channel_mult]
    attention = [2**level in backbone.attention_resolutions for level in range(len(widths))]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "in_channels": backbone.in_channels,
        "out_channels": backbone.in_channels,
        "block_out_channels": widths,
        "layers_per_block": backbone.num_res_blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        "cross_attention_dim": backbone.context_dim,
        "attention_head_dim": backbone.num_heads,  # diffusers reads the number of heads from here for SD 1.x
        "act_fn": "silu",
        "norm_num_groups": 32,
        "norm_eps": 1e-05,
        "center_input_sample": False,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
    }


def vae_config(backbone: BackboneConfig) -> dict[str, Any]:
    """Return diffusers' AutoencoderKL configuration of a backbone."""
    widths = [backbone.vae_ch * m for m in backbone.vae_ch_mult]
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": 512,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": backbone.in_channels,
        "block_out_channels": widths,
        "layers_per_block": backbone.vae_num_res_blocks,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "act_fn": "silu",
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
    }


def _text_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return transformers' CLIPTextModel configuration; heads are 64 wide in every CLIP text encoder."""
    try:
        vocabulary, width = tensors["text_model.embeddings.token_embedding.weight"].shape
        hidden = tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0]
        positions = tensors["text_model.embeddings.position_embedding.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"the text encoder is not CLIP's: {error} is missing, or of another shape") from error
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": hidden,
        "num_hidden_layers": sum(key.endswith("mlp.fc1.weight") for key in tensors),
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": positions,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-05,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
