"""Sizes and options of a VPD model, as dataclasses that survive a JSON round trip."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vpd_fast.errors import InputError, brief
from vpd_fast.fields import between, build, check_fields
from vpd_fast.files import CHECKSUMS, read_json_object, write_json
from vpd_fast.tasks import TASKS

# Names of precisions, as users write them, and their dtypes in PyTorch; the second are those with kernels for CPUs.
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8", "fp8": "float8_e4m3fn"}
CPU_PRECISIONS = ("fp32", "bf16", "int8")
MAP_SOURCES = tuple(f"{place}_{kind}" for place in ("down", "mid", "up") for kind in ("cross", "self"))
LATENT_STRIDE = 8  # the KL encoder halves the image three times
SIZE_MULTIPLE = 64  # and the UNet the latents three times more


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclass(frozen=True)
class BackboneConfig:
    """Stable Diffusion's UNet and KL encoder; the defaults are Stable Diffusion 1.5.

    model_channels, channel_mult, num_res_blocks, num_heads, context_dim, attention_resolutions: the UNet
    (attention_resolutions are downsampling factors of the latents, as in the original configuration).
    vae_ch, vae_ch_mult, vae_num_res_blocks: the KL encoder. in_channels: latent channels.
    """

    model_channels: int = between(32, 2**13, default=320)
    context_dim: int = between(1, 2**16, default=768)
    num_heads: int = between(1, 2**10, default=8)
    num_res_blocks: int = between(1, 8, default=2)
    channel_mult: tuple[int, ...] = between(1, 64, default=(1, 2, 4, 4))
    attention_resolutions: tuple[int, ...] = between(1, 64, default=(4, 2, 1))
    vae_ch: int = between(32, 2**13, default=128)
    vae_ch_mult: tuple[int, ...] = between(1, 64, default=(1, 2, 4, 4))
    vae_num_res_blocks: int = between(1, 8, default=2)
    in_channels: int = between(1, 2**10, default=4)

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("model_channels", "vae_ch"):
            value = getattr(self, name)
            _check(value % 32 == 0, f"BackboneConfig.{name} must be a multiple of 32 (the norms' groups), got {value}")
        for name in ("channel_mult", "vae_ch_mult"):
            value = getattr(self, name)
            _check(
                len(value) == 4,
                f"BackboneConfig.{name} must have 4 levels, as in Stable Diffusion 1.x, got {brief(value)}",
            )
        _check(
            all((self.model_channels * m) % self.num_heads == 0 for m in self.channel_mult),
            f"BackboneConfig.num_heads={self.num_heads} does not divide the UNet widths "
            f"{[self.model_channels * m for m in self.channel_mult]}",
        )
        _check(len(self.attention_resolutions) <= 8, "BackboneConfig.attention_resolutions has more than 8 levels")


@dataclass(frozen=True)
class VPDConfig:
    """One VPD model.

    task: "segmentation", "referring" or "depth".
    num_classes: classes of segmentation (one context token each).
    tokens: context tokens of a sentence in referring segmentation (40 for RefCOCO/+, 77 for G-Ref).
    num_scenes: scene embeddings of depth (27 for NYUv2; 28 in the mmseg port, the last one their mean).
    max_depth: metres that a depth of 1.0 after the sigmoid stands for.
    channels: width of the segmentation neck and head.
    base_size: side of the training images in pixels; it only decides which levels `max_attn_size` includes.
    use_attn: concatenate attention maps to the features; None means True, except for depth (one token: constant maps).
    attn_selector: which layers' maps are averaged, "+"-separated names out of {down,mid,up}_{cross,self}.
    max_attn_size: levels of at most this many latent pixels a side (at base_size) give maps; None: base_size // 16.
    gamma_init_value: start of the text adapter's scale.
    map_grad: let gradients flow through the maps. False is what the original code does.
    latent_scale: factor on the latents. 1.0 is what the original code does; Stable Diffusion was trained with 0.18215.
    train_encoder: let the KL encoder receive gradients. False is what the original code does.
    text_hidden_dim: hidden width of the text adapter; None: context_dim.
    class_names: names of the classes or scenes, for people; may be empty.
    text_encoder: the CLIP encoder whose features the weights were trained with, as TextEncoder takes it; used where no
        other is given. None: not known.
    """

    task: str = "segmentation"
    num_classes: int = between(1, 2**20, default=150)
    tokens: int = between(1, 2**16, default=40)
    num_scenes: int = between(1, 2**20, default=27)
    max_depth: float = between(1e-6, 1e9, default=10.0)
    channels: int = between(1, 2**16, default=256)
    base_size: int = between(1, 2**16, default=512)
    use_attn: bool | None = None
    attn_selector: str = "up_cross+down_cross"
    max_attn_size: int | None = between(0, 2**16, default=None)
    gamma_init_value: float = between(-1e6, 1e6, default=1e-4)
    map_grad: bool = False
    latent_scale: float = between(-1e6, 1e6, default=1.0)
    train_encoder: bool = False
    text_hidden_dim: int | None = between(1, 2**16, default=None)
    class_names: tuple[str, ...] = ()
    text_encoder: str | None = None
    backbone: BackboneConfig = field(default_factory=BackboneConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        _check(self.task in TASKS, f"VPDConfig.task must be one of {', '.join(TASKS)}, got {brief(self.task)}")
        if self.use_attn is None:
            object.__setattr__(self, "use_attn", TASKS[self.task].maps)
        _check(
            self.base_size % SIZE_MULTIPLE == 0,
            f"VPDConfig.base_size must be a multiple of {SIZE_MULTIPLE}, got {self.base_size}",
        )
        unknown = [name for name in self.map_sources if name not in MAP_SOURCES]
        _check(
            not unknown,
            f"VPDConfig.attn_selector: unknown {brief(unknown)}; "
            f"expected names out of {', '.join(MAP_SOURCES)} joined by '+'",
        )
        named = self.embedding_count
        _check(
            not self.class_names or named is None or len(self.class_names) == named,
            f"VPDConfig.class_names has {len(self.class_names)} names, the {self.task} model needs {named}",
        )

    @property
    def map_sources(self) -> tuple[str, ...]:
        """The names in `attn_selector`."""
        return tuple(self.attn_selector.split("+"))

    @property
    def key_prefix(self) -> str:
        """The prefix of the backbone's names in the model's state dict."""
        return TASKS[self.task].key_prefix

    @property
    def embedding_count(self) -> int | None:
        """The number of class or scene embeddings; None for referring, whose text comes with each image."""
        field = TASKS[self.task].count_field
        return None if field is None else getattr(self, field)

    @property
    def context_tokens(self) -> int:
        """Context tokens an image is conditioned on, which is also how many cross-attention maps a level has."""
        return {"segmentation": self.num_classes, "referring": self.tokens, "depth": 1}[self.task]

    def map_channels(self, level: int) -> int:
        """Return the map channels of the feature of `level` (0: latent resolution, 3: an eighth) at base_size."""
        side = self.base_size // LATENT_STRIDE // 2**level
        limit = self.base_size // 16 if self.max_attn_size is None else self.max_attn_size
        if not self.use_attn or side > limit:
            return 0
        lowest = len(self.backbone.channel_mult) - 1
        kinds = set()
        for source in self.map_sources:
            place, kind = source.split("_")
            # The lowest level has no transformer blocks of its own; the middle block is all there is.
            has_attention = level == lowest if place == "mid" else 2**level in self.backbone.attention_resolutions
            if has_attention:
                kinds.add(kind)
        return ("cross" in kinds) * self.context_tokens + ("self" in kinds) * side**2

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of the maps `extract_feat` returns, high resolution first, attention maps included."""
        backbone = self.backbone
        return tuple(backbone.model_channels * m + self.map_channels(i) for i, m in enumerate(backbone.channel_mult))

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers only, as written to config.json."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VPDConfig:
        """Invert `to_dict`. Raises InputError on unknown fields and on values of other types or out of their ranges.

        What config.json says of the weights beside it, "checksums", is left out.
        """
        if isinstance(values, Mapping):
            values = {key: value for key, value in values.items() if key != CHECKSUMS}
        return build(cls, values, strict=True)

    def save(self, path: str | Path) -> None:
        """Write the configuration as JSON."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> VPDConfig:
        """Read a JSON file written by `save`. Raises OSError, ValueError."""
        return cls.from_dict(read_json_object(path))

    def replace(self, **changes: Any) -> VPDConfig:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)
