"""Makes what a run needs out of its configuration: data sets, the model, the text encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vpd_fast.checkpoints import reader
from vpd_fast.config import SIZE_MULTIPLE, VPDConfig
from vpd_fast.data import ANY_TASK, open_dataset
from vpd_fast.errors import CheckpointError, DatasetError, InputError
from vpd_fast.models import VPD
from vpd_fast.models.random_weights import randomize
from vpd_fast.models.text import TextEncoder, encoder_name, set_classes
from vpd_fast.tasks import TASKS
from vpd_fast.training.cache import LatentCache, TextCache
from vpd_fast.training.config import TrainConfig
from vpd_fast.training.frozen import FrozenEncoder
from vpd_fast.training.groups import parameter_groups
from vpd_fast.training.schedules import make_schedule
from vpd_fast.training.tasks import Encode, Sentences


def choose_precision(precision: str, device: torch.device) -> str:
    """Returns "bf16" or "fp32": "auto" is bf16 where the device has arithmetic for it.

    Elsewhere, on CPUs without AVX-512, PyTorch's bfloat16 is some 70 times slower than its float32.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def open_datasets(config: TrainConfig) -> tuple[Any, Any | None]:
    """Open training and validation data; None for the latter where the configuration has none. Raises DatasetError."""
    data = config.data
    options = dict(data.options)
    if data.kind == "nyu":
        options.setdefault("scene_rule", "substring" if config.quirks.substring_scenes else "fixed")
    train = open_dataset(data.kind, data.root, data.train_split, **_with_task(config, options))
    if train.task != config.task:
        raise InputError(f"data.kind {data.kind} is for {train.task}, the configuration's task is {config.task}")
    if not len(train):
        raise DatasetError(f"{data.root}: the split {data.train_split!r} of {data.kind} has no samples to train on")
    if data.val_split is None:
        return train, None
    val_options = _with_task(config, {**options, **data.val_options})
    val = open_dataset(data.kind, data.root, data.val_split, **val_options)
    if not len(val):
        raise DatasetError(f"{data.root}: the split {data.val_split!r} of {data.kind} has no samples to evaluate on")
    if tuple(val.class_names) != tuple(train.class_names):
        raise DatasetError(
            f"{data.root}: {data.train_split} has {len(train.class_names)} classes, {data.val_split} has "
            f"{len(val.class_names)} or others; expected the same"
        )
    return train, val


def _with_task(config: TrainConfig, options: dict[str, Any]) -> dict[str, Any]:
    return {"task": config.task, **options} if config.data.kind in ANY_TASK else options


def text_encoder(config: TrainConfig, model: VPD | None = None, **options: Any) -> Any:
    """Make the CLIP text encoder, loaded when first used: the configuration's, else the one that the model was trained
    with, else the default. options are those of TextEncoder."""
    return TextEncoder(encoder_name(config.init.text_encoder, model and model.config), **options)


def sentence_features(config: TrainConfig, model: VPD) -> Sentences:
    """Return a function from sentences to token features, kept in the configuration's cache if it has one."""
    tokens = model.config.tokens
    # Its own cache has no bound, and a data set has a hundred thousand sentences.
    encoder = text_encoder(config, model, device=model.device, remember=False)

    def embed(sentences: Sequence[str]) -> torch.Tensor:
        return encoder.embed_sentences(list(sentences), tokens=tokens)

    if config.encoder.cache is None:
        return embed
    folder, limit = Path(config.encoder.cache) / "sentences", round(config.encoder.cache_gib * 2**30)
    cache = TextCache(folder, limit, f"{encoder.identity} {encoder.dtype} {tokens}")
    return lambda sentences: cache.embed(sentences, embed)


def latent_encoder(config: TrainConfig, model: VPD) -> Encode:
    """Return a function from images to latents on the model's device, kept on disk unless augmented at random."""
    device = model.device
    encoder = FrozenEncoder(model, config.encoder.precision)

    def encode(images: torch.Tensor) -> torch.Tensor:
        return encoder(images.to(device, non_blocking=True))

    if config.encoder.cache is None or TASKS[config.task].augmented:
        return encode
    folder, limit = Path(config.encoder.cache) / "latents", round(config.encoder.cache_gib * 2**30)
    cache = LatentCache(folder, limit, encoder.identity)
    return lambda images: cache.encode(images, encode).to(device, non_blocking=True)


def build_model(config: TrainConfig, class_names: Sequence[str], encoder: Any = None) -> tuple[VPD, list[str]]:
    """Make the model to begin with, on the CPU, and notes for people on what is not from the weights' file.

    class_names: of the data set; () where it names none. encoder: a TextEncoder for class names; None: that of the
    configuration. What has no weights yet is initialised from `config.seed`.
    """
    torch.manual_seed(config.seed)
    init = config.init
    fields = _model_fields(config, class_names)
    if init.checkpoint is not None:
        return _from_checkpoint(config, init.checkpoint, fields, encoder)
    encoder = encoder or text_encoder(config)
    if "base_size" not in fields:
        fields["base_size"] = -(-config.data.size // SIZE_MULTIPLE) * SIZE_MULTIPLE
    vpd_config = VPDConfig.from_dict({"task": config.task, **fields})
    if init.random is not None:
        model = randomize(VPD.empty(vpd_config), init.random)
        notes = [f"the weights are random (seed {init.random})"]
        if init.class_embeddings is not None:
            _set_embeddings(model, init.class_embeddings)
        return model, notes
    assert init.stable_diffusion is not None  # see TrainConfig.check_complete
    embeddings: Any = init.class_embeddings
    notes = []
    if embeddings is None and not TASKS[config.task].takes_text:
        embeddings = encoder.embed_classes(_names(vpd_config))
        notes.append(f"class embeddings made by {encoder.name}")
    model = VPD.from_stable_diffusion(init.stable_diffusion, vpd_config, class_embeddings=embeddings, ema=init.ema)
    return model, notes


def _model_fields(config: TrainConfig, class_names: Sequence[str]) -> dict[str, Any]:
    """Return fields of VPDConfig: the configuration's, and number and names of the data set's classes."""
    fields = dict(config.model)
    if config.init.text_encoder is not None:
        fields.setdefault("text_encoder", config.init.text_encoder)
    task = TASKS[config.task]
    if task.count_field is None:
        return fields
    count = len(class_names) or (0 if task.unnamed is None else 1)
    wanted = fields.setdefault(task.count_field, count)
    if not isinstance(wanted, int) or wanted < max(count, 1):
        raise InputError(f"model.{task.count_field} must be at least {count}, what the data set has, got {wanted!r}")
    if len(class_names) == wanted:
        fields.setdefault("class_names", tuple(class_names))
    return fields


def _names(config: VPDConfig) -> list[str]:
    count, unnamed = config.embedding_count, TASKS[config.task].unnamed
    if len(config.class_names) == count:
        return list(config.class_names)
    if unnamed is not None and count == 1:
        return [unnamed]
    raise InputError(
        f"the {count} classes have no names to make text embeddings of; expected names in the data set, "
        "model.class_names or init.class_embeddings=FILE"
    )


def _from_checkpoint(config: TrainConfig, path: str, fields: dict[str, Any], encoder: Any) -> tuple[VPD, list[str]]:
    """Load the checkpoint's model; with other classes than the data set's, its weights where the shapes agree."""
    backbone = dict(fields.pop("backbone", {}))
    names = tuple(fields.pop("class_names", ()))
    sizes = {name: fields.pop(name) for name in ("num_classes", "num_scenes") if name in fields}
    model = VPD.from_checkpoint(path, task=config.task, ema=config.init.ema, **backbone, **fields)
    encoder = encoder or text_encoder(config, model)
    notes: list[str] = []
    known = model.config.class_names
    if any(getattr(model.config, name) != value for name, value in sizes.items()):
        new = VPD(model.config.replace(**sizes, class_names=names))
        shapes = {name: tensor.shape for name, tensor in new.state_dict().items()}
        kept = {name: tensor for name, tensor in model.state_dict().items() if tensor.shape == shapes.get(name)}
        new.load_state_dict(kept, strict=False)
        fresh = [name for name in shapes if name not in kept]
        notes.append(f"other classes than in {path}: {len(fresh)} tensors begin anew, such as {fresh[0]}")
        model, known = new, ()
        if config.init.class_embeddings is None:
            _embed(model, _names(model.config), encoder, notes)
    elif names and known and names != known and config.init.class_embeddings is None:
        _embed(model, names, encoder, notes)
    if names and len(names) == len(getattr(model, "class_embeddings", ())):
        model.config = model.config.replace(class_names=names)
    if config.init.class_embeddings is not None:
        _set_embeddings(model, config.init.class_embeddings)
    return model, notes


def _embed(model: VPD, names: Sequence[str], encoder: Any, notes: list[str]) -> None:
    set_classes(model, names, encoder)
    notes.append(f"class embeddings made by {encoder.name}")


def _set_embeddings(model: VPD, path: str) -> None:
    buffer = getattr(model, "class_embeddings", None)
    if buffer is None:
        raise InputError("init.class_embeddings: a referring model has none; its text comes with each sample")
    tensor = reader.read_tensor(Path(path))
    if tensor.shape != buffer.shape:
        raise CheckpointError(f"{path}: expected a {tuple(buffer.shape)} tensor, got {tuple(tensor.shape)}")
    with torch.no_grad():
        buffer.copy_(tensor)


def build_optimizer(
    config: TrainConfig, model: VPD, steps: int
) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    """Make AdamW over the task's groups, which keep their rate as "initial_lr", and the schedule's factor by step."""
    options = config.optimizer
    quirks = {
        "segmentation": config.quirks.unet_norm_full_rate, "referring": config.quirks.dead_lr_scale,
    }.get(config.task, True)  # fmt: skip
    groups = parameter_groups(
        model, lr=options.lr, weight_decay=options.weight_decay, preset=config.task, quirks=quirks,
        unet_lr_scale=options.unet_lr_scale,
    )  # fmt: skip
    for group in groups:
        group["initial_lr"] = group["lr"]
    optimizer = torch.optim.AdamW(
        groups, lr=options.lr, betas=options.betas, eps=options.eps, amsgrad=options.amsgrad, fused=True
    )
    try:
        schedule = make_schedule(config.schedule.name, steps=steps, **config.schedule.options)
    except TypeError as error:
        raise InputError(f"schedule.options: {config.schedule.name} does not take them ({error})") from error
    return optimizer, schedule


def own_memory(model: VPD) -> VPD:
    """Take tensors out of the files they are mapped from: sums depend on how memory is aligned, in their last bits."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return model
