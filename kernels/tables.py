"""What was fastest on a GPU: one JSON file per GPU, which is read once; nothing is timed while a model runs.

The files are those in `configs/` beside this module, or the one that VPD_FAST_TUNING names. A file holds `configs`, the
tiles of Triton's products (`tuning.py`), and `choices`, the times of an operator's implementations
(`vpd_fast/ops/_choices.py`). `vpd-fast tune` writes them.

A GPU has the file of its name (`nvidia-h200.json`), else that of another GPU of the same compute capability, whose
multiprocessors are the same: an H100 that of an H200. Triton is not needed here.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vpd_fast.errors import InputError

FOLDER = Path(__file__).parent / "configs"
VARIABLE = "VPD_FAST_TUNING"
TILE = ("BM", "BN", "BK", "num_warps", "num_stages", "GROUP", "SPLITS")  # what a configuration says
Config = dict[str, int]


class Gpu(NamedTuple):
    """A kind of GPU."""

    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


@dataclass(frozen=True)
class Times:
    """How long the implementations of an operator took for one shape, in microseconds, the fastest first.

    sizes: what tells shapes of one key apart, such as rows, columns and channels. source: where the times come from.
    """

    sizes: tuple[int, ...]
    microseconds: Mapping[str, float]
    source: str = ""

    def __str__(self) -> str:
        times = ", ".join(f"{name} {time:.4g}" for name, time in self.microseconds.items())
        return f"{'x'.join(map(str, self.sizes))} ({times} us)"


@dataclass(frozen=True)
class Table:
    """What a file says. configs: by key and rows of a product. choices: by operator and key."""

    path: Path
    gpu: str = ""
    capability: tuple[int, int] | None = None
    configs: Mapping[str, Mapping[int, Config]] = field(default_factory=dict)
    choices: Mapping[tuple[str, str], tuple[Times, ...]] = field(default_factory=dict)

    def fits(self, gpu: Gpu) -> bool:
        """Return whether it was measured on such a GPU, as far as it says."""
        if self.capability is not None:
            return self.capability == gpu.capability
        return self.gpu in ("", gpu.name)


class Found(NamedTuple):
    """The table of a GPU, or None, and in words which one that is and why."""

    table: Table | None
    words: str


def slug(name: str) -> str:
    """Return the name of a GPU as its file is called."""
    return "-".join(name.lower().split())


def gpu_of(device: torch.device) -> Gpu | None:
    """Return the kind of GPU that a device is; None for tensors that only claim to be on one."""
    try:
        return Gpu(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    except (AssertionError, RuntimeError):  # PyTorch without CUDA, or no such device
        return None


def path_of(device: torch.device) -> Path:
    """Return the file that `vpd-fast tune` writes for a device: the one that VPD_FAST_TUNING names, or its own."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else FOLDER / f"{slug(torch.cuda.get_device_name(device))}.json"


@functools.lru_cache
def of_device(device: torch.device) -> Found:
    """Return the table of a device. Raises InputError if VPD_FAST_TUNING names a file that is not there.

    A file that is damaged, or that was measured on another kind of GPU, is left aside with a warning.
    """
    gpu = gpu_of(device)
    return Found(None, f"there is no GPU {device}") if gpu is None else of_gpu(gpu)


def of_gpu(gpu: Gpu) -> Found:
    """Return the table of a kind of GPU, as `of_device` does."""
    return _of_gpu(gpu, os.environ.get(VARIABLE, ""))


@functools.lru_cache
def _of_gpu(gpu: Gpu, named: str) -> Found:
    if named:
        if not Path(named).is_file():
            raise InputError(f"{VARIABLE}={named}: there is no such file")
        table = _checked(Path(named))
        if table is None:
            return Found(None, f"{named} is damaged")
        if not table.fits(gpu):
            measured_on = f"{table.gpu or 'another GPU'}{_capability(table)}"
            warnings.warn(f"{named} was measured on {measured_on}, not on {gpu}; it is left aside", stacklevel=2)
            return Found(None, f"{named} is of another GPU")
        return Found(table, f"{named} ({VARIABLE})")
    own = FOLDER / f"{slug(gpu.name)}.json"
    if own.is_file():
        table = _checked(own)
        return Found(table, own.name if table else f"{own.name} is damaged")
    for path in sorted(FOLDER.glob("*.json")):
        table = _checked(path)
        if table is not None and table.capability == gpu.capability:
            return Found(table, f"{path.name}, which a {gpu} shares")
    return Found(None, f"no table for {gpu}")


def _capability(table: Table) -> str:
    return f" (compute capability {'.'.join(map(str, table.capability))})" if table.capability else ""


@functools.lru_cache
def _checked(path: Path) -> Table | None:
    """The table, or None with a warning if it is none."""
    try:
        return read(path)
    except InputError as error:
        warnings.warn(f"{error}; until then implementations and tiles go by the rules", stacklevel=4)
        return None


def forget() -> None:
    """Forget what was read, so that the next look-up reads it again."""
    for cache in (of_device, _of_gpu, _checked):
        cache.cache_clear()


def read(path: Path) -> Table:
    """Return what a file says. Raises InputError if it is no table."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        capability = content.get("capability")
        return Table(
            path,
            str(content.get("device", "")),
            None if capability is None else _pair(capability),
            _configs(content.get("configs", [])),
            _choices(content.get("choices", [])),
        )
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no table of tuned configurations ({error!r}); delete it or tune again") from error


def _pair(capability: Any) -> tuple[int, int]:
    major, minor = capability
    return _count(major), _count(minor, least=0)


def _count(value: Any, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{value!r} is no integer from {least}")
    return value


def _configs(rows: Iterable[Any]) -> dict[str, dict[int, Config]]:
    table: dict[str, dict[int, Config]] = {}
    for row in rows:
        if "LIBRARY" in row["config"]:  # was a configuration once, and is an implementation now
            continue
        config = {name: _count(row["config"][name]) for name in TILE}
        table.setdefault(str(row["key"]), {})[_count(row["rows"])] = config
    return table


def _choices(rows: Iterable[Any]) -> dict[tuple[str, str], tuple[Times, ...]]:
    table: dict[tuple[str, str], dict[tuple[int, ...], Times]] = {}
    for row in rows:
        sizes = tuple(_count(size) for size in row["sizes"])
        times = sorted((_time(time), str(name)) for name, time in row["us"].items())
        found = Times(sizes, {name: time for time, name in times}, str(row.get("source", "")))
        table.setdefault((str(row["operator"]), str(row["key"])), {})[sizes] = found
    return {key: tuple(found[sizes] for sizes in sorted(found)) for key, found in table.items()}


def _time(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{value!r} is no time")
    return float(value)
