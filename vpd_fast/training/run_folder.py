"""The folder of a run: what lies where, and whether one may begin or go on in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vpd_fast.checkpoints.save import save_pretrained
from vpd_fast.errors import CheckpointError, InputError, TrainingError
from vpd_fast.files import json_text
from vpd_fast.locking import RunLock
from vpd_fast.models import VPD
from vpd_fast.training.checkpoint import CheckpointStore, remove, write_text
from vpd_fast.training.config import TrainConfig, differences

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
BEST = "best"
LOCK = ".lock"
# What a resumed run may have otherwise: nothing that its weights depend on.
FREE = (
    "device", "data.root", "data.workers", "data.on_error", "data.max_failures", "log", "checkpoints", "evaluation",
    "encoder.cache", "encoder.cache_gib", "max_nan_steps", "checkpointing", "init.stable_diffusion", "init.checkpoint",
    "init.class_embeddings",
)  # fmt: skip


def resume_from(folder: Path | None, store: CheckpointStore | None, resume: str | Path) -> Path | None:
    """Return the checkpoint to go on from, or None to begin. Raises InputError where the folder does not allow it."""
    if folder is None or store is None:
        return None
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; expected a folder for the run")
    last = store.last()
    used = folder.is_dir() and not all(_is_residue(path) for path in folder.iterdir())
    if str(resume) == "auto":
        if last is None and used and not (folder / CONFIG).is_file():
            raise InputError(f"{folder}: is not empty and holds no run to resume; give another folder")
        return last
    if str(resume) == "never":
        if used and last is not None:
            raise InputError(
                f"{folder}: is not empty; --resume auto goes on with the run in it, or give another folder"
            )
        if used:
            raise InputError(f"{folder}: is not empty and has no checkpoint to go on from; give another folder")
        return None
    path = Path(resume)
    if not path.is_dir():
        raise InputError(f"--resume must be auto, never or a checkpoint's folder, got {path}, which is none")
    if last is not None and path.resolve() != last.resolve():
        raise InputError(
            f"{folder}: holds a run whose last checkpoint is {last.name}; going on from {path} would mix two runs, "
            "give another folder with -o"
        )
    if last is None and used:
        raise InputError(f"{folder}: is not empty; expected a new folder to resume {path} in")
    return path


def _is_residue(path: Path) -> bool:
    """Return whether a run that was killed before it wrote anything left this."""
    return path.name == LOCK or (path.name.startswith(".") and path.name.endswith(".tmp"))


def open_folder(
    folder: Path, store: CheckpointStore, config: TrainConfig, resume: str | Path, resumed_from: Path | None
) -> RunLock:
    """Make the folder, remove what an earlier process left half-written, and write the configuration.

    resumed_from: what `resume_from` returned before the model was built; it must still. Returns the lock that keeps
    other runs out until it is released. Raises InputError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder / LOCK)
        try:
            if resume_from(folder, store, resume) != resumed_from:
                raise InputError(f"{folder}: another run has written there in the meantime")
            store.clean()
            for left in (*folder.glob(".*.tmp"), *(folder / BEST).glob(".*.tmp")):
                remove(left)
            write_text(folder / CONFIG, config.to_yaml())
        except BaseException:
            lock.release()
            raise
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error})") from error
    return lock


def require_there(paths: Iterable[Path]) -> None:
    """Raise TrainingError unless all files and folders that a run has written are still there."""
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise TrainingError(f"{', '.join(missing)}: written by this run, and removed while it went on")


def save_best(folder: Path, model: VPD, metrics: Mapping[str, Any]) -> None:
    """Write the best model so far, for `VPD.from_pretrained`, and its metrics. Raises CheckpointError."""
    save_pretrained(model, folder / BEST)
    try:
        write_text(folder / BEST / "metrics.json", json_text(metrics))
    except OSError as error:
        raise CheckpointError(f"{folder / BEST}: cannot be written ({error.strerror})") from error


def check_same(old: TrainConfig, new: TrainConfig, path: Path) -> None:
    """Raise InputError that lists what differs, if it is more than a resumed run may change."""
    changed = differences(old, new, FREE)
    if changed:
        raise InputError(f"{path} was trained with another configuration: {'; '.join(changed)}")
