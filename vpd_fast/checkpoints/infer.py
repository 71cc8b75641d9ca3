"""The configuration of a model from the names and shapes of its weights."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vpd_fast.config import LATENT_STRIDE, MAP_SOURCES, VPDConfig
from vpd_fast.config import BackboneConfig as Backbone
from vpd_fast.errors import CheckpointError, brief
from vpd_fast.tasks import TASKS

Shapes = Mapping[str, tuple[int, ...]]

UNET = "unet.unet.diffusion_model."
ENCODER = "encoder_vq."
_CROSS = ("up_cross", "down_cross")
_BASE_SIZES = (512, 384, 640, 768, 1024, 256, 128)
_BACKBONE_FIELDS = frozenset(Backbone.__dataclass_fields__)


def infer_task(shapes: Shapes) -> str | None:
    """Return the task of a state dict with the released VPD names, or None."""
    return next((name for name, task in TASKS.items() if all(key in shapes for key in task.signature)), None)


def infer_config(shapes: Shapes, metadata: Mapping[str, Any] | None = None, **overrides: Any) -> VPDConfig:
    """Infer the configuration of a VPD state dict.

    shapes: {name: shape} with the names of the released checkpoints, wrapper prefixes removed. metadata: `class_names`
    and `max_depth` are used. overrides: VPDConfig and BackboneConfig fields that win over what is inferred; num_heads
    and max_depth leave no trace in shapes (defaults 8 and 10.0), and of base_size, attn_selector and max_attn_size only
    the number of map channels does: the most usual settings that fit are taken. Raises CheckpointError when the shapes
    are not those of a VPD model.
    """
    metadata = metadata or {}
    task = infer_task(shapes)
    if task is None:
        raise CheckpointError(f"not a VPD model: no head of a known task among {_first_names(shapes)}")
    backbone_overrides = {name: overrides.pop(name) for name in list(overrides) if name in _BACKBONE_FIELDS}
    root = TASKS[task].key_prefix
    try:
        backbone = overrides.pop("backbone", None) or backbone_of(shapes, **backbone_overrides)
        values = {"task": task, "backbone": backbone, **_sizes(shapes, task, root, backbone)}
        if task == "depth" and isinstance(metadata.get("max_depth"), (int, float)):
            values["max_depth"] = float(metadata["max_depth"])
        values.update(overrides)
        names = metadata.get("class_names") or ()
        if len(names) == values.get(TASKS[task].count_field or ""):
            values.setdefault("class_names", tuple(names))
        return _with_maps(values, _map_channels(shapes, task, backbone), overrides)
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"not a complete {task} model: cannot find the shape of {brief(error.args[0])}"
        ) from error
    except CheckpointError:
        raise
    except (ValueError, ZeroDivisionError) as error:  # InputError is one; sizes of 0, other numbers of dimensions
        raise CheckpointError(f"these weights do not make a valid {task} model: {error}") from error


def backbone_of(shapes: Shapes, **overrides: Any) -> Backbone:
    """Infer the sizes of the networks in a VPD state dict. Raises CheckpointError unless they are SD 1.x's."""
    root = "encoder." if f"encoder.{UNET}input_blocks.0.0.weight" in shapes else ""
    return infer_backbone(_below(shapes, root + UNET), _below(shapes, root + ENCODER), **overrides)


def infer_backbone(unet: Shapes, vae: Shapes, **overrides: Any) -> Backbone:
    """Infer the sizes of Stable Diffusion's networks from ldm names without prefix; the autoencoder may be missing.

    Raises CheckpointError when they are not SD 1.x's.
    """
    try:
        return Backbone(**{**_backbone_values(unet, vae), **overrides})
    except (KeyError, IndexError) as error:
        missing = brief(error.args[0])
        raise CheckpointError(f"not a complete Stable Diffusion 1.x: cannot find the shape of {missing}") from error
    except CheckpointError:
        raise
    except (ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"not Stable Diffusion 1.x: {error}") from error


def _backbone_values(unet: Shapes, vae: Shapes) -> dict[str, Any]:
    width, latent = unet["input_blocks.0.0.weight"][:2]
    blocks = next((i for i in range(1, len(unet)) if f"input_blocks.{i + 1}.0.op.weight" in unet), 0)
    count = 1 + max(int(m[1]) for key in unet if (m := re.match(r"input_blocks\.(\d+)\.", key)))
    # There are no more blocks than weights, whatever number a name has.
    firsts = list(range(1, min(count, len(unet)), blocks + 1))
    if not blocks or len(firsts) != 4:
        raise CheckpointError(f"not Stable Diffusion 1.x: its UNet has {len(firsts)} levels, expected 4")
    values: dict[str, Any] = {
        "model_channels": width,
        "in_channels": latent,
        "num_res_blocks": blocks,
        "channel_mult": tuple(unet[f"input_blocks.{i}.0.out_layers.3.weight"][0] // width for i in firsts),
        "attention_resolutions": tuple(
            2**level for level, i in reversed(list(enumerate(firsts))) if f"input_blocks.{i}.1.norm.weight" in unet
        ),
        "context_dim": unet["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
    }
    if vae:
        values |= autoencoder_values(vae)
    return values


def autoencoder_values(vae: Shapes) -> dict[str, Any]:
    """Return the BackboneConfig fields of a KL autoencoder with ldm names. Raises KeyError if one is missing."""
    first = vae["encoder.conv_in.weight"][0]
    widths = itertools.takewhile(
        bool, (vae.get(f"encoder.down.{i}.block.0.conv1.weight", (0,))[0] for i in itertools.count())
    )
    in_level = (f"encoder.down.0.block.{i}.conv1.weight" in vae for i in itertools.count())
    return {
        "vae_ch": first,
        "vae_ch_mult": tuple(n // first for n in widths),
        "vae_num_res_blocks": sum(1 for _ in itertools.takewhile(bool, in_level)),
    }


def _sizes(shapes: Shapes, task: str, root: str, backbone: Backbone) -> dict[str, Any]:
    hidden = shapes.get(f"{root}text_adapter.fc.0.weight", (backbone.context_dim,))[0]
    values: dict[str, Any] = {"text_hidden_dim": None if hidden == backbone.context_dim else hidden}
    if task == "segmentation":
        values["num_classes"] = shapes["decode_head.conv_seg.weight"][0]
        values["channels"] = shapes["neck.fpn_convs.0.conv.weight"][0]
        embeddings = shapes.get("class_embeddings", (values["num_classes"],))[0]
        if embeddings != values["num_classes"]:
            raise CheckpointError(
                f"class_embeddings has {embeddings} rows, decode_head.conv_seg {values['num_classes']} classes; "
                "expected one embedding a class"
            )
    elif task == "depth":
        embeddings = shapes.get("encoder.class_embeddings")
        if embeddings:
            values["num_scenes"] = embeddings[0]
    return values


def _map_channels(shapes: Shapes, task: str, backbone: Backbone) -> tuple[int, ...]:
    """Return the map channels of the head's inputs per level; but for segmentation the last two are summed."""
    widths = [backbone.model_channels * m for m in backbone.channel_mult]
    if task == "segmentation":
        return tuple(shapes[f"neck.lateral_convs.{i}.conv.weight"][1] - width for i, width in enumerate(widths))
    if task == "referring":
        hidden = shapes["classifier.conv1_4.weight"][0]
        inputs = [shapes[f"classifier.conv1_{stage}.weight"][1] for stage in (2, 3, 4)]
        return inputs[0] - hidden - widths[0], inputs[1] - hidden - widths[1], inputs[2] - widths[2] - widths[3]
    first, second = (shapes[f"encoder.{name}.0.weight"] for name in ("layer1", "layer2"))
    merged = shapes["encoder.out_layer.0.weight"][1] - first[0] - second[0]
    return first[1] - widths[0], second[1] - widths[1], merged - widths[2] - widths[3]


def _with_maps(values: dict[str, Any], channels: tuple[int, ...], overrides: Mapping[str, Any]) -> VPDConfig:
    """Add the first map settings that give `channels`."""
    if not any(channels) and overrides.get("use_attn") is not True:
        return VPDConfig(**{**values, "use_attn": False})
    tokens = [overrides["tokens"]] if "tokens" in overrides else []
    for settings in _map_settings(overrides):
        candidate = {**values, **settings, "use_attn": True}
        side = [settings["base_size"] // LATENT_STRIDE // 2**level for level in range(4)]
        if not TASKS[values["task"]].takes_text:
            options = [{}]
        else:  # the number of tokens is only known through the maps, which may also hold self-attention's
            found = {c - own for c, s in zip(channels, side, strict=False) for own in (0, s * s) if c - own > 0}
            options = [{"tokens": n} for n in tokens or sorted(found)] or [{}]
        for option in options:
            config = VPDConfig(**{**candidate, **option})
            maps = [config.map_channels(level) for level in range(4)]
            if tuple(maps[: len(channels) - 1]) == channels[:-1] and sum(maps[len(channels) - 1 :]) == channels[-1]:
                return config
    raise CheckpointError(
        f"the head takes {channels} map channels, high resolution first, which no attn_selector, max_attn_size and "
        f"base_size explain for {values['task']}; give these three as overrides"
    )


def _map_settings(overrides: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield map settings to try, the most usual first; overridden ones are fixed."""
    extras = [(), ("mid_cross",), ("up_self", "down_self"), ("mid_cross", "mid_self", "up_self", "down_self")]
    selectors = ["+".join(_CROSS + extra) for extra in extras]
    selectors += ["up_self+down_self", "+".join(name for name in MAP_SOURCES if name.endswith("self"))]
    bases = [overrides["base_size"]] if "base_size" in overrides else _BASE_SIZES
    if "attn_selector" in overrides:
        selectors = [overrides["attn_selector"]]
    for base, selector in itertools.product(bases, selectors):
        latent = base // LATENT_STRIDE
        sizes = (
            [overrides["max_attn_size"]] if "max_attn_size" in overrides else [None, latent, latent // 4, latent // 8]
        )
        for size in sizes:
            yield {"base_size": base, "attn_selector": selector, "max_attn_size": size}


def _below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {key[len(prefix) :]: shape for key, shape in shapes.items() if key.startswith(prefix)}


def _first_names(shapes: Shapes) -> str:
    names = list(shapes)
    return ", ".join(names[:4]) + (f", ... ({len(names)} names)" if len(names) > 4 else "")
