"""Builds models from checkpoints. There is no second copy of the weights, neither when they are read nor mapped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpd_fast.bundled import NAMES, is_bundled
from vpd_fast.checkpoints import reader
from vpd_fast.checkpoints.checkpoint import LDM_VAE, Checkpoint
from vpd_fast.checkpoints.checksums import require_intact
from vpd_fast.checkpoints.formats import is_backbone, ldm_to_vpd, open_checkpoint
from vpd_fast.checkpoints.infer import backbone_of, infer_config
from vpd_fast.checkpoints.mapped import copied
from vpd_fast.checkpoints.report import LoadReport, first_names
from vpd_fast.config import BackboneConfig, VPDConfig
from vpd_fast.errors import CheckpointError, InputError, brief
from vpd_fast.files import as_path
from vpd_fast.hub.download import STABLE_DIFFUSION_FILES, HubName, local_path
from vpd_fast.models.vpd import VPD
from vpd_fast.tasks import TASKS


def load_checkpoint(
    path: str | Path,
    *,
    task: str | None = None,
    allow_missing: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    mmap: bool = False,
    ema: bool = False,
    verify: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **config_overrides: Any,
) -> VPD:
    """Load a VPD model from a released file, the mmsegmentation 1.x depth port, a file or folder of this package, one
    of the miniatures that come with it ("shapes-segmentation", "shapes-referring", "shapes-depth"), or a repository of
    the Hugging Face hub ("owner/name", or "owner/name/file").

    task: what the checkpoint must hold; None: whatever it holds. allow_missing: weights the file lacks keep their fresh
    initialisation instead of raising. dtype: of the parameters, None: float32 whatever the file has. mmap: True leaves
    float32 weights on the CPU in the file until they are used; they may be trained, which does not change the file, but
    the file must not be overwritten in place, by torch.save for example, while the model lives: that ends the process.
    config_overrides: VPDConfig or BackboneConfig fields that shapes do not tell
    (num_heads, max_depth, base_size, ...). ema: the averages over the training (EMA) in place of the weights; an
    error where the file has none. verify: compare the weights with the check sums in the folder's settings first
    (`vpd_fast.checkpoints.verify`); an error where there are none. revision, token, cache_dir, local_files_only: of
    the hub, as `vpd_fast.hub.local_path` takes them.

    The model is in eval mode and carries a `LoadReport` as `load_report`. Raises CheckpointError: unreadable or hostile
    file, another task, weights that are missing, not finite or of other shapes; InputError: unknown task or override.
    """
    if task is not None and not (isinstance(task, str) and task in TASKS):
        raise InputError(f"load_checkpoint: task must be one of {', '.join(TASKS)}, got {brief(task)}")
    path = local_path(path, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    if verify:
        require_intact(path)
    checkpoint = open_checkpoint(path, ema=ema)
    config = vpd_config(checkpoint, config_overrides, task)
    model = _build(checkpoint, checkpoint.tensors, config, allow_missing, device, dtype, mmap)
    model.load_report.notes += _assumptions(checkpoint, config, config_overrides)
    return model


def _assumptions(checkpoint: Checkpoint, config: VPDConfig, overrides: Mapping[str, Any]) -> list[str]:
    """Return a note on the settings that a file without a configuration does not tell."""
    if checkpoint.config is not None:
        return []
    values: dict[str, Any] = {"num_heads": config.backbone.num_heads, "base_size": config.base_size}
    if config.use_attn:
        values["attn_selector"] = config.attn_selector
    if config.task == "depth" and "max_depth" not in checkpoint.metadata:
        values["max_depth"] = config.max_depth
    assumed = ", ".join(f"{name}={value!r}" for name, value in values.items() if name not in overrides)
    return [f"assumed, as shapes do not tell: {assumed} (load_checkpoint takes others)"] if assumed else []


def load_pretrained(folder: str | Path, **options: Any) -> VPD:
    """Load a model from a folder written by `save_pretrained`, a repository of the hub that has its files, or bundled
    weights; options as in `load_checkpoint`."""
    if not is_bundled(folder) and HubName.of(folder) is None and not as_path(folder, "folder").is_dir():
        raise CheckpointError(
            f"{folder}: expected a folder written by save_pretrained, owner/name of the hub, or one of "
            f"{', '.join(NAMES)}"
        )
    return load_checkpoint(folder, **options)


def load_stable_diffusion(
    path: str | Path,
    config: VPDConfig,
    *,
    class_embeddings: Tensor | str | Path | None = None,
    allow_missing: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    mmap: bool = False,
    ema: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> VPD:
    """Make a model for fine-tuning: encoder and UNet of Stable Diffusion 1.x, everything else freshly initialised.

    path: ldm .ckpt or .safetensors, a diffusers folder, or a repository of the hub ("owner/name" with such a folder,
    "owner/name/file"). config: task and sizes; its backbone must be the file's.
    class_embeddings: (num_classes or num_scenes, context_dim), or a file with that one tensor; needed for segmentation
    and depth unless allow_missing, which leaves them zero. All else (eval mode, report, options, errors) as in
    `load_checkpoint`.
    """
    path = local_path(
        path, STABLE_DIFFUSION_FILES, revision=revision, token=token, cache_dir=cache_dir,
        local_files_only=local_files_only,
    )  # fmt: skip
    checkpoint = open_checkpoint(path, ema=ema)
    if not checkpoint.is_stable_diffusion:
        raise CheckpointError(
            f"{path}: is a VPD model; expected Stable Diffusion 1.x (load this file with load_checkpoint)"
        )
    if not any(key.startswith(LDM_VAE) for key in checkpoint.tensors) and not allow_missing:
        raise CheckpointError(
            f"{checkpoint.path}: has no VAE ({LDM_VAE}*), only the UNet; expected both, or allow_missing=True"
        )
    heads = {} if "num_heads" in checkpoint.metadata else {"num_heads": config.backbone.num_heads}
    _check_backbone(checkpoint.path, checkpoint.backbone(**heads), config.backbone)
    tensors = ldm_to_vpd(checkpoint.tensors, config.task)
    if class_embeddings is not None:
        tensors[f"{config.key_prefix}class_embeddings"] = _read_embeddings(class_embeddings, config)
    elif config.embedding_count is not None and not allow_missing:
        raise CheckpointError(
            f"missing class embeddings: a {config.task} model needs class_embeddings=, a ({config.embedding_count}, "
            f"{config.backbone.context_dim}) tensor or a file with it (made from class names by vpd_fast.models.text), "
            "or allow_missing=True to fill them in later"
        )
    return _build(checkpoint, tensors, config, allow_missing, device, dtype, mmap, fresh_heads=True)


def vpd_config(checkpoint: Checkpoint, overrides: Mapping[str, Any], task: str | None = None) -> VPDConfig:
    """Return the configuration of an opened VPD checkpoint, stored or inferred, with `overrides`.

    Raises CheckpointError (also when it is not of `task`) and InputError.
    """
    overrides = dict(overrides)
    known = set(VPDConfig.__dataclass_fields__) | set(BackboneConfig.__dataclass_fields__)
    if set(overrides) - known:
        raise InputError(f"unknown options {sorted(set(overrides) - known)}; configuration fields are {sorted(known)}")
    if checkpoint.is_stable_diffusion:
        raise CheckpointError(
            f"{checkpoint.path}: is Stable Diffusion without a VPD head; expected a VPD model "
            "(VPD.from_stable_diffusion starts one from this file)"
        )
    try:
        if checkpoint.config is None:
            config = infer_config(checkpoint.shapes, checkpoint.metadata, **overrides)
        else:
            inner = {k: overrides.pop(k) for k in list(overrides) if k in BackboneConfig.__dataclass_fields__}
            backbone = BackboneConfig(**{**checkpoint.config.to_dict()["backbone"], **inner})
            config = checkpoint.config.replace(**{"backbone": backbone, **overrides})
            _check_backbone(
                checkpoint.path, backbone_of(checkpoint.shapes, num_heads=backbone.num_heads), config.backbone
            )
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    if task is not None and config.task != task:
        raise CheckpointError(f"{checkpoint.path}: holds a {config.task} model; expected {task}")
    return config


def empty_model(config: VPDConfig, path: Path) -> VPD:
    """Return `VPD.empty(config)`. Raises CheckpointError for sizes from a file that cannot be built."""
    try:
        return VPD.empty(config)
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path}: its sizes do not make a valid {config.task} model: {error}") from error


def match_weights(
    checkpoint: Checkpoint, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], task: str
) -> tuple[dict[str, Tensor], LoadReport]:
    """Return the tensors that a model with state dict `expected` takes, in its order, and the report on all others.

    Raises CheckpointError when a shape does not fit.
    """
    report = LoadReport(checkpoint.path, checkpoint.format, task)
    report.contents, report.placeholders = checkpoint.contents, checkpoint.placeholders
    taken: dict[str, Tensor] = {}
    for key, target in expected.items():
        if key in tensors:
            tensor = tensors[key]
            if tensor.shape != target.shape:
                raise CheckpointError(
                    f"{checkpoint.path}: {key} has shape {tuple(tensor.shape)}, expected {tuple(target.shape)}"
                )
            if tensor.is_floating_point() != target.is_floating_point():
                raise CheckpointError(f"{checkpoint.path}: {key} has dtype {tensor.dtype}, expected {target.dtype}")
            taken[key] = tensor
        elif not key.endswith("num_batches_tracked"):
            report.missing.append(key)
    report.loaded = list(taken)
    report.dtypes = reader.dtype_names(taken)
    report.sort_leftovers(key for key in tensors if key not in expected)
    report.unexpected += checkpoint.skipped
    return taken, report


def raise_missing(report: LoadReport) -> None:
    """Raise CheckpointError when the report has missing weights."""
    if report.missing:
        raise CheckpointError(
            f"{report.source}: {report.task} weights are missing, {first_names(report.missing)}"
            f" (allow_missing=True initialises them freshly); unexpected in the file: {first_names(report.unexpected)}"
        )


def _build(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    config: VPDConfig,
    allow_missing: bool,
    device: torch.device | str,
    dtype: torch.dtype | None,
    mmap: bool,
    fresh_heads: bool = False,
) -> VPD:
    dtype = dtype or torch.float32
    if not dtype.is_floating_point:
        raise InputError(f"load_checkpoint: dtype must be a floating dtype, got {dtype}")
    model = empty_model(config, checkpoint.path)
    expected = model.state_dict()
    taken, report = match_weights(checkpoint, tensors, expected, config.task)
    if fresh_heads:
        report.fresh = [key for key in report.missing if not is_backbone(key)]
        report.missing = [key for key in report.missing if is_backbone(key)]
    if not allow_missing:
        raise_missing(report)
    if report.fresh or report.missing:
        model = VPD(config)  # for the initial values of what the file lacks
    weights: dict[str, Tensor] = {}
    addresses: set[int] = set()
    for key, tensor in taken.items():
        weight = reader.to_dtype(tensor, dtype, device)
        if not mmap:
            weight = copied(weight, checkpoint.files)  # unless it was converted
        reader.require_finite(checkpoint.path, key, weight, tensor)
        # Two names for the same bytes in the file are still two parameters.
        # Counters are copied, or they alone would keep a file mapped whose weights have all been converted.
        if not weight.is_floating_point():
            weight = weight.to(expected[key].dtype)
        repeated = weight.data_ptr() in addresses
        weights[key] = weight.clone() if repeated or not weight.is_floating_point() else weight
        addresses.add(weight.data_ptr())
    for key in (k for k in expected if k.endswith("num_batches_tracked") and k not in weights):
        weights[key] = torch.zeros((), dtype=torch.int64, device=device)
    model.load_state_dict(weights, strict=False, assign=True)
    model.to(device=device, dtype=dtype)
    model.load_report = report
    return model.eval()


def _check_backbone(path: Path, found: BackboneConfig, wanted: BackboneConfig) -> None:
    names = BackboneConfig.__dataclass_fields__
    different = [n for n in names if getattr(found, n) != getattr(wanted, n)]
    if different:
        details = ", ".join(f"{n} is {getattr(found, n)}, expected {getattr(wanted, n)}" for n in different)
        raise CheckpointError(f"{path}: the weights are of another network than the configuration's: {details}")


def _read_embeddings(source: Tensor | str | Path, config: VPDConfig) -> Tensor:
    tensor = source if isinstance(source, Tensor) else reader.read_tensor(source)
    count = config.embedding_count
    if count is None:
        raise InputError("class_embeddings: a referring model has none; its text comes with each call")
    expected = (count, config.backbone.context_dim)
    if tuple(tensor.shape) != expected or not tensor.is_floating_point():
        raise InputError(
            f"class_embeddings: expected a floating {expected} tensor, got {tensor.dtype} {tuple(tensor.shape)}"
        )
    return tensor.detach().clone()
