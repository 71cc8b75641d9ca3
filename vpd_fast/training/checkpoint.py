"""Checkpoints of a run: folders that are complete as soon as they have their name, and an index beside them.

A checkpoint is written into a hidden folder, forced to disk and renamed, so that a process that is killed at any
moment, or a full disk, leaves the earlier ones as they were. What such an end leaves behind is removed at the next
start.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vpd_fast.errors import CheckpointError, InputError
from vpd_fast.files import Writer, is_full_disk, json_text, read_text, temporary_path, write_files

INDEX = "index.json"
STATE = "training.pt"
_STEP = re.compile(r"step_(\d{6,})")
_TEMPORARY = re.compile(r"\..*\.tmp")


class CheckpointStore:
    """The folder `checkpoints` of a run: step_000123/, ... and index.json.

    keep: how many of the last checkpoints stay. One process writes; any number may read.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise InputError(f"checkpoints.keep must be at least 1, got {keep}")
        self.folder = Path(folder)
        self.keep = keep

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, ascending."""
        names = [path.name for path in self.folder.iterdir() if path.is_dir()] if self.folder.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))

    def path(self, step: int) -> Path:
        """Return where the checkpoint of `step` is, or would be."""
        return self.folder / f"step_{step:06d}"

    def last(self) -> Path | None:
        """Return the newest checkpoint."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def clean(self) -> list[Path]:
        """Remove what a killed process left half-written, and checkpoints beyond `keep` that it had not removed yet.

        Returns what was half-written. Only the writing process calls it.
        """
        left = [path for path in self.folder.glob(".*") if _TEMPORARY.fullmatch(path.name)]
        for path in left:
            remove(path)
        self._discard_old()
        return left

    def save(self, step: int, writers: Mapping[str, Writer]) -> Path:
        """Write a checkpoint; each writer gets the path of its file (or folder). Older ones than `keep` are removed.

        A step that is there already is not written again. Raises CheckpointError, naming the last checkpoint, when it
        cannot be written; nothing has changed then.
        """
        path = self.path(step)
        if path.is_dir():
            return path
        temporary = temporary_path(path)
        try:
            temporary.mkdir(parents=True)
            for name, write in writers.items():
                write(temporary / name)
            _sync_tree(temporary)
            os.rename(temporary, path)
            _sync(self.folder)
        except Exception as error:  # torch and safetensors report a full disk as errors of their own
            remove(temporary)
            raise CheckpointError(self._failure(step, error)) from error
        except BaseException:
            remove(temporary)
            raise
        self._discard_old()
        return path

    def _failure(self, step: int, error: Exception) -> str:
        last = self.last()
        why = "the disk is full" if is_full_disk(error) else " ".join(str(error).split()) or type(error).__name__
        rest = f"the last one is {last}" if last is not None else "there is no earlier one"
        return f"the checkpoint of step {step} cannot be written to {self.folder} ({why}); {rest}"

    def _discard_old(self) -> None:
        for step in self.steps()[: -self.keep]:
            self._discard(step)

    def _discard(self, step: int) -> None:
        """Take the name away first: a folder with a name is always complete."""
        hidden = temporary_path(self.path(step))
        with contextlib.suppress(OSError):  # one too many does no harm
            os.rename(self.path(step), hidden)
            remove(hidden)

    def read_index(self) -> dict[str, Any]:
        """Read what `write_index` wrote, {} if nothing yet. Raises CheckpointError for a damaged file."""
        path = self.folder / INDEX
        try:
            values = json.loads(read_text(path))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: is not readable JSON ({error}); remove it to go on without it") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: expected a JSON object; remove it to go on without it")
        return values

    def write_index(self, **values: Any) -> None:
        """Change entries of index.json: "last", "best", "evaluated" ... Raises CheckpointError."""
        content = {**self.read_index(), **values}
        last = self.last()
        if last is not None:
            content["last"] = last.name
        try:
            write_text(self.folder / INDEX, json_text(content))
        except OSError as error:
            raise CheckpointError(f"{self.folder / INDEX}: cannot be written ({error.strerror or error})") from error


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, force it to disk and rename it."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)

    write_files({path: write})
    _sync(path.parent)


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state of tensors, numbers, texts and plain containers."""
    torch.save(dict(state), path)


def read_state(folder: str | Path) -> dict[str, Any]:
    """Read the training state in a checkpoint folder; it runs no code. Raises CheckpointError."""
    path = Path(folder) / STATE
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: is not a checkpoint to resume from, which holds {STATE} and model.safetensors"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch errors: all mean a damaged file
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{path}: cannot be read ({reason})") from error
    if not isinstance(state, dict) or "step" not in state:
        raise CheckpointError(f"{path}: is no training state of this package")
    return state


def random_state() -> dict[str, Any]:
    """Return the state of the generators of Python, numpy, torch and the GPU, as plain containers and tensors."""
    version, internal, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()  # a tuple, though numpy's types also allow a dict
    name, keys, position, has_gauss, cached = numpy_state
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `random_state` returned; a GPU's state is left out where there is none."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def remove(path: Path) -> None:
    """Remove a file or folder, and do not mind if that fails."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            _sync(Path(root) / name)
        _sync(Path(root))


def _sync(path: Path) -> None:
    """Force a file or folder to disk, where the system can do that with folders."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
