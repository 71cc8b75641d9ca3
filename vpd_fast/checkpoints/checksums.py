"""Check sums of weights, in the settings beside them: whether what is there is what was saved.

"checksums" in config.json or engine.json is {"algorithm": "sha256", "total": ..., "tensors": {name: ...}}. That of a
tensor is of its dtype and shape as text ("float32 320x4x3x3" and a line feed) and its numbers, little-endian and row by
row; the total is that of the lines "name checksum", sorted, so that the order in a file has no say.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpd_fast import bundled
from vpd_fast._startup import usable_cpus
from vpd_fast.checkpoints import reader
from vpd_fast.checkpoints.mapped import copied
from vpd_fast.checkpoints.report import first_names
from vpd_fast.errors import CheckpointError, InputError, brief
from vpd_fast.fields import build
from vpd_fast.files import CHECKSUMS, CONFIG_NAME, ENGINE_NAME, ENGINE_WEIGHTS_NAME, WEIGHTS_NAME, as_path

ALGORITHM = "sha256"
_THREADS = 4  # at most: with more, memory is what limits; so many tensors are in memory at a time
_FOLDERS = {CONFIG_NAME: WEIGHTS_NAME, ENGINE_NAME: ENGINE_WEIGHTS_NAME}  # settings, and the weights that they are of

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclass(frozen=True)
class Verification:
    """What `verify` found. different: tensors whose check sums are others, and files that are wrong as a whole."""

    path: Path
    recorded: bool
    tensors: int = 0
    nbytes: int = 0
    different: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """Return "ok" or "different", or "none" where there are no check sums."""
        if not self.recorded:
            return "none"
        return "different" if self.different else "ok"

    def __str__(self) -> str:
        if not self.recorded:
            return f"{self.path}: has no check sums; those of folders that this package writes are in their settings"
        if self.different:
            return f"{self.path}: is not what was saved: {first_names(self.different)}"
        return f"{self.path}: ok, {self.tensors} tensors, {self.nbytes / 1e9:.2f} GB ({ALGORITHM})"


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the check sums of tensors, as they are written into settings."""
    found = dict(_hashed(tensors.items()))
    return {"algorithm": ALGORITHM, "total": _total(found), "tensors": found}


def verify(path: str | Path, progress: Progress | None = None) -> Verification:
    """Compare the weights in a folder that `save_pretrained`, training or a fast model wrote with their check sums.

    path: the folder. Other checkpoints, and folders of earlier versions, have none. progress: called after each tensor.
    It reads all of the file, in 1 to 2 s per GB on one processor. Raises CheckpointError where there is no such path,
    or the settings cannot be read.
    """
    path = as_path(path, "path")
    found = [_verify(path, name, progress) for name in _FOLDERS if (path / name).is_file()]
    if not found and not path.exists() and not bundled.is_bundled(path):
        raise CheckpointError(f"{path}: no such file or folder")
    different = tuple(name for part in found for name in part.different)
    recorded = bool(found) and (bool(different) or all(part.recorded for part in found))
    return Verification(path, recorded, sum(v.tensors for v in found), sum(v.nbytes for v in found), different)


def require_intact(path: str | Path, name: str = CONFIG_NAME) -> None:
    """Raise CheckpointError unless a folder's weights are those that were saved with the settings of that name."""
    path = as_path(path, "path")
    found = _verify(path, name, None) if (path / name).is_file() else Verification(path, False)
    if found.status != "ok":
        raise CheckpointError(str(found))


@dataclass(frozen=True)
class _Record:
    algorithm: str = ""
    total: str = ""
    tensors: dict[str, Any] = field(default_factory=dict)


def _verify(path: Path, name: str, progress: Progress | None) -> Verification:
    """Compare the weights that the settings `name` in a folder are of."""
    values = reader.read_json(path / name).get(CHECKSUMS)
    if values is None:
        return Verification(path, False)
    try:
        record: _Record = build(_Record, values, CHECKSUMS, strict=True)
    except InputError as error:
        raise CheckpointError(f"{path / name}: {error}") from error
    if record.algorithm != ALGORITHM:
        raise CheckpointError(f"{path / name}: check sums by {brief(record.algorithm)}, expected {ALGORITHM}")
    try:
        raw = reader.read_file(path / _FOLDERS[name])
    except CheckpointError as error:  # a header that is damaged, or no file
        return Verification(path, True, different=(str(error).replace(f"{path}/", "", 1),))
    total, done = sum(tensor.nbytes for tensor in raw.tensors.values()), 0
    found: dict[str, str] = {}
    for key, checksum in _hashed((key, copied(tensor, raw.files)) for key, tensor in raw.tensors.items()):
        found[key] = checksum
        done += raw.tensors[key].nbytes
        if progress is not None:
            progress(done, total)
    keys = sorted(record.tensors.keys() | found.keys())
    different = [key for key in keys if record.tensors.get(key) != found.get(key)]
    if not different and _total(found) != record.total:
        different = [f"the total in {name}"]
    return Verification(path, True, len(found), total, tuple(different))


def _hashed(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, str]]:
    """Yield (name, check sum) in order; several tensors at a time, as hashing leaves other threads free."""
    with ThreadPoolExecutor(min(_THREADS, usable_cpus())) as pool:
        waiting: deque[tuple[str, Future[str]]] = deque()
        for name, tensor in tensors:
            waiting.append((name, pool.submit(_checksum, tensor)))
            if len(waiting) >= _THREADS:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()


def _checksum(tensor: Tensor) -> str:
    shape = "x".join(map(str, tensor.shape))
    digest = hashlib.sha256(f"{str(tensor.dtype).removeprefix('torch.')} {shape}\n".encode())
    numbers = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    digest.update(numbers.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _total(tensors: Mapping[str, str]) -> str:
    lines = "".join(f"{name} {checksum}\n" for name, checksum in sorted(tensors.items()))
    return hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()
