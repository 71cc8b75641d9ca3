"""The configuration of a training run: sections as dataclasses, read from YAML, strict about what it does not know."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vpd_fast.config import CPU_PRECISIONS, BackboneConfig, VPDConfig
from vpd_fast.errors import InputError, MissingDependencyError
from vpd_fast.fields import build, check_keys, close_names, field_names
from vpd_fast.files import check_size, read_text
from vpd_fast.tasks import TASKS

PRESETS = Path(__file__).parent / "presets"
PRESET_BASE = "base"  # the preset that the others build on; not a run of its own


@dataclass(frozen=True)
class InitConfig:
    """Where the weights come from: exactly one of stable_diffusion, checkpoint and random.

    stable_diffusion: an ldm .ckpt or .safetensors file, or a diffusers folder. checkpoint: a VPD file or folder.
    random: a seed, for trying things out. ema: begin with the averages over the training (EMA) that the file has beside
    the weights. class_embeddings: a file with one tensor (classes or scenes, context_dim);
    without it they come from the checkpoint, or from text_encoder, a CLIP folder or hub id (None: the default one).
    """

    stable_diffusion: str | None = None
    checkpoint: str | None = None
    random: int | None = None
    class_embeddings: str | None = None
    text_encoder: str | None = None
    ema: bool = False


@dataclass(frozen=True)
class DataConfig:
    """The data set: what `vpd_fast.data.open_dataset` and `make_transform` get.

    options: of the data set, val_options: changes to them for the validation split. transform: of the training
    transform. val_split None: no evaluation. on_error: "skip" replaces samples that cannot be read, "raise" stops.
    """

    kind: str = "folder"
    root: str = ""
    train_split: str = "train"
    val_split: str | None = "val"
    size: int = 512
    options: dict[str, Any] = field(default_factory=dict)
    val_options: dict[str, Any] = field(default_factory=dict)
    transform: dict[str, Any] = field(default_factory=dict)
    workers: int = 4
    on_error: str = "skip"
    max_failures: int = 100


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. clip: the largest gradient norm, None leaves gradients as they are.

    unet_lr_scale: factor on the UNet's learning rate; None: the original's, which differs by task.
    """

    lr: float = 1e-4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False
    clip: float | None = None
    unet_lr_scale: float | None = None


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over time, by `vpd_fast.training.schedules.make_schedule`; either steps or epochs.

    options: of the schedule of that name, such as power or warmup.
    """

    name: str = "constant"
    steps: int | None = None
    epochs: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EncoderConfig:
    """The frozen image encoder: its precision, and a cache of its results on disk.

    cache: a folder, None: none. It serves what is not augmented at random, as in referring segmentation, and sentences.
    cache_gib: what the latents in it may take, and the sentences as much again at most.
    """

    precision: str = "bf16"
    cache: str | None = None
    cache_gib: float = 20.0


@dataclass(frozen=True)
class QuirksConfig:
    """Oddities of the original code; true does as it does, which is the default. Each concerns one task.

    unet_norm_full_rate (segmentation): the norms of the UNet train at the full learning rate, not a tenth of it.
    ignored_in_mean (segmentation): ignored pixels count in the mean of the loss.
    dead_lr_scale (referring): the UNet's factor 0.01 on the learning rate has no effect.
    substring_scenes (depth): the scene is the first name that the file name contains ("study" for "study_room").
    """

    unet_norm_full_rate: bool = True
    ignored_in_mean: bool = True
    dead_lr_scale: bool = True
    substring_scenes: bool = True


@dataclass(frozen=True)
class EvaluationConfig:
    """When to evaluate, always at the end as well. options: of `vpd_fast.evaluation.evaluate`."""

    every_steps: int | None = None
    every_epochs: int | None = None
    limit: int | None = None
    batch_size: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointsConfig:
    """When to save, always at the end, before an evaluation and when stopped as well; keep: how many of the last."""

    every_steps: int | None = None
    every_minutes: float | None = 30.0
    keep: int = 2


@dataclass(frozen=True)
class LogConfig:
    """What is logged. every: steps between entries of metrics.jsonl. pictures: samples to draw at each evaluation."""

    every: int = 50
    tensorboard: bool = True
    pictures: int = 4


@dataclass(frozen=True)
class DistributedConfig:
    """Use of several GPUs. sync_bn: batch norms share statistics. fsdp: weights and optimizer are spread out."""

    sync_bn: bool = True
    fsdp: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    task: "segmentation", "referring" or "depth". model: fields of VPDConfig. batch_size: images per process and pass.
    accumulation: passes per step. precision: "fp32", "bf16" by autocast with float32 weights, or "auto": bf16 where
    the device has arithmetic for it, else fp32. checkpointing: levels whose blocks are recomputed in backward (0: the
    highest resolution), true: all, false: none. device: "auto" or "cpu". max_nan_steps: so many steps in a row may be
    skipped because their loss or gradient is not finite.
    """

    task: str = "segmentation"
    model: dict[str, Any] = field(default_factory=dict)
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    batch_size: int = 2
    accumulation: int = 1
    precision: str = "bf16"
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    attention_backend: str = "sdpa"
    checkpointing: bool | tuple[int, ...] = False
    quirks: QuirksConfig = field(default_factory=QuirksConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoints: CheckpointsConfig = field(default_factory=CheckpointsConfig)
    log: LogConfig = field(default_factory=LogConfig)
    seed: int = 0
    device: str = "auto"
    max_nan_steps: int = 20
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        _one_of("task", self.task, TASKS)
        _one_of("precision", self.precision, ("auto", "fp32", "bf16"))
        _one_of("encoder.precision", self.encoder.precision, ("plain", *CPU_PRECISIONS))
        _one_of("data.on_error", self.data.on_error, ("skip", "raise"))
        _one_of("device", self.device, ("auto", "cpu"))
        check_keys(self.model, field_names(VPDConfig), "model")
        if "task" in self.model:
            raise InputError(f"model.task: the task is a setting of its own, task={self.model['task']}")
        if isinstance(self.model.get("backbone"), Mapping):
            check_keys(self.model["backbone"], field_names(BackboneConfig), "model.backbone")
        for name in _POSITIVE:
            value = _look_up(self, name)
            if value is not None and value <= 0:
                raise InputError(f"{name} must be positive, got {value}")
        for name in ("data.workers", "log.pictures", "max_nan_steps", "optimizer.weight_decay", "seed"):
            if _look_up(self, name) < 0:
                raise InputError(f"{name} must not be negative, got {_look_up(self, name)}")
        if self.data.size % 32:
            raise InputError(f"data.size must be a multiple of 32, got {self.data.size}")
        multiple = TASKS[self.task].size_multiple
        if self.data.size % multiple:
            raise InputError(f"data.size must be a multiple of {multiple} for {self.task}, got {self.data.size}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers only, as written to config.yaml."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Invert `to_dict`; what is left out has its default. Raises InputError on unknown keys and wrong types."""
        return build(cls, values)

    def replace(self, **changes: Any) -> TrainConfig:
        """Return a copy with some fields changed; a section may be given as a dict of the fields to change."""
        return TrainConfig.from_dict(merge(self.to_dict(), changes))

    def to_yaml(self) -> str:
        """Return the configuration as YAML, every setting of it."""
        return _yaml().safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def save(self, path: str | Path) -> None:
        """Write the configuration as YAML."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    def check_complete(self) -> None:
        """Raise InputError where something is missing that has no default: the data, the weights, the end."""
        if not self.data.root:
            raise InputError(
                "data.root is not set; expected the folder of the data set, e.g. data.root=/data/ADEChallengeData2016"
            )
        given = [name for name in ("stable_diffusion", "checkpoint", "random") if getattr(self.init, name) is not None]
        if len(given) != 1:
            raise InputError(
                "init must say where the weights come from, by one of init.stable_diffusion=PATH, init.checkpoint=PATH "
                f"and init.random=SEED; got {' and '.join(given) or 'none of them'}"
            )
        if self.init.ema and self.init.random is not None:
            raise InputError(
                "init.ema goes with init.checkpoint or init.stable_diffusion; random weights have no averages"
            )
        if (self.schedule.steps is None) == (self.schedule.epochs is None):
            both = "both" if self.schedule.steps is not None else "neither"
            raise InputError(f"schedule must have either steps or epochs, got {both} (null takes one away)")


_POSITIVE = (
    "batch_size", "accumulation", "data.size", "data.max_failures", "optimizer.lr", "optimizer.eps", "optimizer.clip",
    "optimizer.unet_lr_scale", "schedule.steps", "schedule.epochs", "encoder.cache_gib", "evaluation.every_steps",
    "evaluation.every_epochs", "evaluation.limit", "evaluation.batch_size", "checkpoints.every_steps",
    "checkpoints.every_minutes", "checkpoints.keep", "log.every",
)  # fmt: skip


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a preset or a YAML or JSON file, with overrides `section.key=value` whose values are parsed as YAML.

    A file may build on a preset or another file: `base: ade20k`. Raises InputError.
    """
    values = _read(name, ())
    for override in overrides:
        values = merge(values, _override(override))
    return TrainConfig.from_dict(values)


def preset_names() -> list[str]:
    """Return the names that `load_config` knows."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml") if path.stem != PRESET_BASE)


def merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with `changes`, dicts inside dicts likewise."""
    result = dict(values)
    for key, change in changes.items():
        both = isinstance(change, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merge(result[key], change) if both else change
    return result


def differences(old: TrainConfig, new: TrainConfig, ignore: Iterable[str] = ()) -> list[str]:
    """List what differs, as "optimizer.lr: 0.1 was 0.2", but for the keys (or sections) in `ignore`."""
    before, after = (_flat(config.to_dict()) for config in (old, new))
    ignored = tuple(ignore)
    found = []
    for key in sorted(before.keys() | after.keys()):
        if any(key == name or key.startswith(f"{name}.") for name in ignored):
            continue
        if before.get(key) != after.get(key):
            found.append(f"{key} is {json.dumps(after.get(key))}, was {json.dumps(before.get(key))}")
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read(name: str | Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = _find(name, seen[-1].parent if seen else Path())
    if path in seen:
        raise InputError(f"{path} is built on itself: {' -> '.join(p.name for p in (*seen, path))}")
    yaml = _yaml()
    try:
        values = yaml.safe_load(read_text(path))
        check_size(values)  # anchors can stand for more than memory holds
    except RecursionError:
        raise InputError(f"{path}: is not readable YAML (lists in lists without end)") from None
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise InputError(f"{path}: is not readable YAML ({' '.join(str(error).split())})") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected settings as key: value, got a {type(values).__name__}")
    base = values.pop("base", None)
    return values if base is None else merge(_read(str(base), (*seen, path)), values)


def _find(name: str | Path, folder: Path) -> Path:
    text = str(name)
    if text in (*preset_names(), PRESET_BASE):
        return PRESETS / f"{text}.yaml"
    path = (folder / text).resolve()
    if path.is_file():
        return path
    raise InputError(
        f"{text}: neither a file nor a preset{close_names(text, preset_names())}; "
        f"presets are {', '.join(preset_names())}"
    )


def _override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key or not all(key.split(".")):
        raise InputError(f"overrides look like optimizer.lr=1e-4, got {text!r}")
    yaml = _yaml()
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"{key}: {value!r} is not a YAML value ({' '.join(str(error).split())})") from error
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return parsed


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingDependencyError('configurations need PyYAML: pip install "vpd_fast[train]"') from error
    return yaml


def _look_up(config: TrainConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _one_of(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")
