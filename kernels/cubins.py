"""Launches of kernels that were compiled ahead of time, from one archive beside this file; see docs/gpu.md.

The archive is a zip file of cubins (machine code of one kernel each) and `index.json`, which finds them by architecture
and by what Triton would compile the kernel anew for (`specialization.py`). `vpd-fast compile-kernels` makes it. It fits
one state of the kernels' sources, whose hash it has. What it lacks, Triton compiles when it is first called.
"""

import functools
import hashlib
import json
import os
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vpd_fast import _native
from vpd_fast.errors import InputError, MissingDependencyError, brief
from vpd_fast.kernels.specialization import layout, parse, specialize

FOLDER = Path(__file__).parent
ARCHIVE = FOLDER / "cubins.zip"
INDEX = "index.json"
FORMAT = 1  # of the index
VARIABLE = "VPD_FAST_CUBINS"
MODES = ("", "off", "only")
DRIVER = "libcuda.so.1"
# GPUs that run machine code of another architecture, as it is of the same major version: A10, A40, RTX 30 series; L4,
# L40, RTX 40 series. They have less shared memory (99 KB a block), which the kernels for sm_80 keep to.
COMPATIBLE = {"sm_86": "sm_80", "sm_89": "sm_80"}


class UnusableError(Exception):
    """Why an archive, or a kernel of it, cannot be used."""


@functools.cache
def hash_of_sources() -> str:
    """Changes with every file of kernels."""
    state = hashlib.sha256()
    for path in sorted(FOLDER.glob("*.py")):
        state.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return state.hexdigest()


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**20:
        raise ValueError(f"{value!r} is no number of threads, bytes or pointers")
    return value


@dataclass(frozen=True)
class Entry:
    """A compiled kernel: its file in the archive, threads of a block, bytes of shared memory."""

    file: str
    threads: int
    shared: int


@dataclass(frozen=True)
class Archive:
    """An archive's index. entries: by architecture, such as "sm_90", and key.

    sources: hash of the kernels. triton, cuda: versions of the compiler and of the assembler. scratch: pointers to
    scratch memory, which no kernel uses, behind the parameters.
    """

    path: Path
    sources: str
    triton: str
    cuda: str
    scratch: int
    entries: dict[str, dict[str, Entry]]

    @staticmethod
    def read(path: Path) -> "Archive":
        """Raises UnusableError for what is no archive of this format; FileNotFoundError."""
        try:
            with zipfile.ZipFile(path) as file:
                index = json.loads(file.read(INDEX))
                known = set(file.namelist())
            if index["format"] != FORMAT:
                raise UnusableError(f"its format is {brief(index['format'])}; this version reads {FORMAT}")
            entries = {
                architecture: {key: Entry(str(file), _count(n), _count(size)) for key, (file, n, size) in rows.items()}
                for architecture, rows in index["kernels"].items()
            }
            if not {entry.file for rows in entries.values() for entry in rows.values()} <= known:
                raise UnusableError("it is damaged: files are missing")
            texts = (str(index[name]) for name in ("sources", "triton", "cuda"))
            return Archive(path, *texts, _count(index["scratch"]), entries)
        except FileNotFoundError:
            raise
        except (OSError, zipfile.BadZipFile, zlib.error, ValueError, KeyError, TypeError, AttributeError, IndexError,
                NotImplementedError, RuntimeError) as error:  # fmt: skip
            raise UnusableError(f"it is damaged ({error!r})") from error

    def entries_for(self, architecture: str, driver: int) -> dict[str, Entry]:
        """What GPUs of this architecture run, by key.

        Raises UnusableError unless it is of these sources, and for such GPUs and this version of the driver.
        """
        if self.sources != hash_of_sources():
            raise UnusableError(
                "it was made from other sources of the kernels; vpd-fast compile-kernels makes it again"
            )
        taken = architecture if architecture in self.entries else COMPATIBLE.get(architecture)
        if taken not in self.entries:
            raise UnusableError(f"this GPU is {architecture}, and it has kernels for {', '.join(sorted(self.entries))}")
        if driver // 1000 < int(self.cuda.partition(".")[0]):
            version = f"{driver // 1000}.{driver % 1000 // 10}"
            raise UnusableError(f"the driver is for CUDA {version}, and it was assembled by CUDA {self.cuda}")
        return self.entries[taken]

    def cubin(self, entry: Entry) -> bytes:
        """A kernel's machine code. Raises UnusableError if it is damaged."""
        try:
            with zipfile.ZipFile(self.path) as file:
                return file.read(entry.file)
        except (OSError, zipfile.BadZipFile, zlib.error, KeyError, NotImplementedError, RuntimeError) as error:
            raise UnusableError(f"{entry.file} in it is damaged ({error!r})") from error


def _describe(archive: Path) -> str:
    return f"kernels that were compiled ahead of time ({archive})"


FALLBACK = "Triton compiles kernels when they are first called instead, which takes about a second for each"


class Table:
    """The kernels of an archive for the GPUs of one architecture."""

    def __init__(self, archive: Archive, architecture: str, driver: Any, only: bool = False) -> None:
        """driver: a `_C_cuda.Driver`. only: what cannot be launched is an error. Raises UnusableError."""
        self._entries = archive.entries_for(architecture, driver.version)
        self._archive, self._driver, self._only = archive, driver, only
        self._kernels: dict[tuple[str, int], Any] = {}  # loaded on a device, None if they cannot be
        self._warned = False

    def launch(
        self, kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], device: int, stream: int
    ) -> bool:
        """Enqueues the kernel of a launch. False, after a warning the first time, if that cannot be done.

        device: its number. stream: its handle. Raises MissingDependencyError instead, if there is to be nothing else.
        """
        key, values = specialize(kernel, arguments)
        if (key, device) not in self._kernels:
            self._kernels[key, device] = self._load(key, device)
        cubin = self._kernels[key, device]
        if cubin is None:
            return False
        scratch = self._archive.scratch
        packed = layout(key, scratch)[0].pack(*values, *[0] * scratch)
        cubin.launch((*grid, 1, 1)[:3], packed, device, stream)
        return True

    def _load(self, key: str, device: int) -> Any:
        try:
            entry = self._entries.get(key)
            if entry is None:
                raise UnusableError(f"{key} is not in it")
            packing, offsets = layout(key, self._archive.scratch)
            name = parse(key)[0].rpartition(".")[2]
            image = self._archive.cubin(entry)
            cubin = self._driver.cubin(image, name, entry.threads, entry.shared, offsets, packing.size)
            try:
                cubin.load(device)
            except RuntimeError as error:
                raise UnusableError(f"the driver does not load {entry.file} for {key} ({error})") from error
            return cubin
        except UnusableError as error:
            if self._only:
                raise MissingDependencyError(f"{VARIABLE}=only, but {error}: {self._archive.path}") from error
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{_describe(self._archive.path)} are not used where they lack something: {error}. {FALLBACK}",
                    stacklevel=4,
                )
            return None


def mode() -> str:
    """What VPD_FAST_CUBINS says: "", "off" or "only". Raises InputError for anything else."""
    value = os.environ.get(VARIABLE, "")
    if value not in MODES:
        raise InputError(f"environment variable {VARIABLE} must be one of off, only, or not set, got {brief(value)}")
    return value


def open_table(capability: tuple[int, int]) -> Table | None:
    """Kernels for GPUs of that compute capability; None if none can be used, after a warning if there is an archive.

    Raises MissingDependencyError instead where the environment says that there is to be nothing else.
    """
    chosen = mode()
    if chosen == "off":
        return None
    try:
        try:
            archive = Archive.read(ARCHIVE)
        except FileNotFoundError:
            if chosen == "only":
                raise UnusableError("there is no such file; vpd-fast compile-kernels makes it") from None
            return None
        missing = _native.why_missing("_C_cuda")
        if missing is not None:
            raise UnusableError(missing)
        make = getattr(_native.load("_C_cuda"), "Driver", None)
        if make is None:
            raise UnusableError("vpd_fast._C_cuda is of an older version; reinstall vpd_fast")
        try:
            driver = make(DRIVER)
        except RuntimeError as error:
            raise UnusableError(str(error)) from error
        return Table(archive, f"sm_{capability[0]}{capability[1]}", driver, chosen == "only")
    except UnusableError as error:
        if chosen == "only":
            raise MissingDependencyError(f"{VARIABLE}=only, but {ARCHIVE} cannot be used: {error}") from error
        warnings.warn(f"{_describe(ARCHIVE)} are not used: {error}. {FALLBACK}", stacklevel=4)
        return None


@functools.cache
def table_for(device: torch.device) -> Table | None:
    """Kernels for that GPU, as `open_table` says."""
    return open_table(torch.cuda.get_device_capability(device))


def summary() -> str:
    """One line about the archive, for `vpd-fast info`."""
    try:
        archive = Archive.read(ARCHIVE)
    except FileNotFoundError:
        return "none (vpd-fast compile-kernels makes them)"
    except UnusableError as error:
        return f"{ARCHIVE}: {error}"
    counts = ", ".join(f"{len(rows)} for {name}" for name, rows in sorted(archive.entries.items()))
    stale = "" if archive.sources == hash_of_sources() else "; made from other sources, and not used"
    return f"{counts}; Triton {archive.triton}, CUDA {archive.cuda}{stale}"
