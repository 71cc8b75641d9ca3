"""Prediction on very many images: which ones, by which process, what is done already, and reading ahead.

Memory grows neither with the images of a run nor with its results: names are listed as they are needed, records go to
a file at once. Only a resumed run remembers eight bytes for each image that is done.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from vpd_fast.errors import ImageError, InputError
from vpd_fast.pictures.reading import read_image

Record = dict[str, Any]
WRITERS = 2  # threads that write pictures while the next image is predicted
_STOPPING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # no later image could be written either


@dataclass(frozen=True)
class Shard:
    """Part `index` (from 0) of `count` equal parts of the images: every count-th one."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InputError(f"shard {self.index}/{self.count}: expected I/N with 0 <= I < N")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "I/N", I counted from 0. Raises InputError."""
        try:
            index, count = (int(part) for part in text.split("/"))
        except ValueError:
            raise InputError(f"a shard is I/N, part I (from 0) of N, got {text!r}") from None
        return cls(index, count)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Shard:
        """From RANK and WORLD_SIZE, which torchrun sets; everything where they are not set. Raises InputError."""
        return cls.parse(f"{environment.get('RANK', '0')}/{environment.get('WORLD_SIZE', '1')}")

    def take(self, items: Iterable[Any]) -> Iterator[Any]:
        """This part of `items`."""
        return islice(items, self.index, None, self.count)

    def file(self, stem: str, suffix: str) -> str:
        """A file name of its own: "results.jsonl", or "results-00002-of-00008.jsonl"."""
        part = "" if self.count == 1 else f"-{self.index:05d}-of-{self.count:05d}"
        return f"{stem}{part}{suffix}"


# Names


def walk_images(folder: str, suffixes: tuple[str, ...], recursive: bool = True) -> Iterator[str]:
    """Paths of a folder's images, with its subfolders if `recursive`; always in the same order.

    Linked folders are not entered, hidden files and folders are left out. Raises InputError where a folder cannot be
    read.
    """

    def unreadable(error: OSError) -> None:
        raise InputError(f"{error.filename}: the folder cannot be read ({error.strerror})")

    for place, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if recursive and not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(suffixes):
                yield os.path.join(place, name)


def read_list(lines: Iterable[str]) -> Iterator[str]:
    """Paths of a list, one per line. Empty lines and lines that begin with "#" are left out; spaces inside stay."""
    for line in lines:
        path = line.strip()
        if path and not path.startswith("#"):
            yield path


def relative_name(path: str, root: str) -> str:
    """The name of an image in results: its path below `root`, an absolute path, with "/" between folders.

    Raises InputError for an image outside.
    """
    inside = os.path.relpath(os.path.join(root, path), root)
    if inside == os.pardir or inside.startswith(os.pardir + os.sep) or os.path.isabs(inside):
        raise InputError(f"{path} is not in {root}; results keep the folders below it, so choose another root")
    return inside.replace(os.sep, "/")


# Records


class Records:
    """A shard's records as JSON lines in `folder`, and the names of its failed images as text.

    header: the model and its options, the first line. resume: False wants no earlier file; True goes on after what
    any shard of the folder recorded as done with the same header. Each record is on disk before the next is made; a
    last line that was cut off is dropped.
    Raises InputError where a file is in the way or has another header, ImageError where it cannot be written.
    """

    def __init__(self, folder: str | Path, shard: Shard, header: Record, resume: bool = False) -> None:
        self.path = Path(folder) / shard.file("results", ".jsonl")
        self.failed_path = Path(folder) / shard.file("failed", ".txt")
        self._done: set[bytes] = set()
        self.done = self.failed = self.skipped = 0
        header = json.loads(json.dumps(header))
        if resume:
            for path in sorted(Path(folder).glob("results*.jsonl")):
                self._done |= _finished(path, header)
            _drop_cut_line(self.path)
        elif self.path.exists():
            raise InputError(f"{self.path} exists: --resume goes on from it, or choose another folder")
        try:
            # One line at a time: what is recorded survives the process.
            self._file = self.path.open("a", encoding="utf-8", buffering=1)
            self._failures = self.failed_path.open("w", encoding="utf-8", buffering=1)  # those are tried again
        except OSError as error:
            raise InputError(f"{error.filename}: cannot be written ({error.strerror})") from error
        if self._file.tell() == 0:
            self._put(self._file, json.dumps({"header": header}))

    def is_done(self, name: str) -> bool:
        """Whether an earlier run finished this image."""
        return bool(self._done) and _digest(name) in self._done

    def add(self, record: Record) -> None:
        """Write one: {"image": name, ...}, with "error" if it failed. Raises ImageError."""
        self._put(self._file, json.dumps(record))
        if "error" in record:
            self.failed += 1
            self._put(self._failures, f"{json.dumps(record['image'])}\t{' '.join(record['error'].split())}")
        else:
            self.done += 1

    def _put(self, file: Any, line: str) -> None:
        try:
            file.write(line + "\n")
        except OSError as error:
            raise ImageError(f"{file.name}: cannot be written ({error.strerror}); what it has is kept") from error

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._failures.close()
        if not self.failed:
            self.failed_path.unlink(missing_ok=True)


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def _finished(path: Path, header: Record) -> set[bytes]:
    """Names that a file records as done, as digests. Raises InputError for another header."""
    found: set[bytes] = set()
    try:
        with path.open(encoding="utf-8") as file:
            for i, line in enumerate(file):
                if not line.endswith("\n"):
                    break  # cut off, or being written
                record = json.loads(line)
                if i == 0:
                    _check_header(path, record.get("header"), header)
                elif "error" not in record:
                    found.add(_digest(record["image"]))
    except (ValueError, KeyError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}, line {i + 1}: not a record of results ({error})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return found


def _check_header(path: Path, found: Any, expected: Record) -> None:
    if not isinstance(found, dict):
        raise InputError(f"{path}: its first line does not say what it holds")
    names = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
    if names:
        changed = "; ".join(f"{name} was {found.get(name)!r}, is {expected.get(name)!r}" for name in names)
        raise InputError(
            f"{path} is of another run ({changed}); resume with the same options, or choose another folder"
        )


def _drop_cut_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(end - 2**16, 0)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                file.truncate(start + newline + 1)
                return
            end = start
        file.truncate(0)


# Running


def predict_shard(
    predictor: Callable[[Any], Any],
    images: Iterable[tuple[str, str]],
    write: Callable[[Any, str], Record],
    records: Records,
    *,
    prefetch: int = 4,
) -> Iterator[Record]:
    """Predict on images (name, path), one record for each, in order, after it is in `records`.

    predictor: array (H,W,3) uint8 -> result. write: (result, name) -> what to record; it runs in a thread, while the
    next image is predicted. prefetch: how many images are read ahead, and how many results may wait for being written.
    Images that are done are skipped (`records.skipped`). Those that cannot be read, that are too large for the memory
    or whose files cannot be written give a record with "error". A full or broken disk ends the run with ImageError.
    """
    waiting: deque[tuple[Record, Future | None]] = deque()
    with ThreadPoolExecutor(WRITERS) as writers, contextlib.ExitStack() as stack:
        ahead = _read_ahead(_left(images, records), prefetch)
        stack.callback(ahead.close)
        try:
            for name, outcome in ahead:
                record, result = _predict_one(predictor, name, outcome)
                waiting.append((record, None if result is None else writers.submit(write, result, name)))
                while waiting and (len(waiting) > prefetch or waiting[0][1] is None or waiting[0][1].done()):
                    yield _recorded(*waiting.popleft(), records)
        except KeyboardInterrupt:
            while waiting:  # predicted already, so worth keeping
                _recorded(*waiting.popleft(), records)
            raise
        while waiting:
            yield _recorded(*waiting.popleft(), records)


def _left(images: Iterable[tuple[str, str]], records: Records) -> Iterator[tuple[str, str]]:
    for name, path in images:
        if records.is_done(name):
            records.skipped += 1
        else:
            yield name, path


def _read_ahead(images: Iterable[tuple[str, str]], count: int) -> Iterator[tuple[str, Any]]:
    """(name, array or the error of reading it), with up to `count` images being read or waiting."""
    images = iter(images)
    with ThreadPoolExecutor(min(max(count, 1), 8)) as readers:
        pending = deque((name, readers.submit(_read, path)) for name, path in islice(images, max(count, 1)))
        try:
            while pending:
                name, future = pending.popleft()
                found = future.result()
                for following, path in islice(images, 1):
                    pending.append((following, readers.submit(_read, path)))
                yield name, found
        finally:
            for _, future in pending:
                future.cancel()


def _read(path: str) -> Any:
    try:
        return read_image(path)
    except (ImageError, InputError) as error:
        return error
    except MemoryError:
        return _too_large(path)


def _too_large(name: str) -> ImageError:
    return ImageError(f"{name}: not enough memory for an image of this size")


def _predict_one(predictor: Callable[[Any], Any], name: str, image: Any) -> tuple[Record, Any]:
    import torch

    if isinstance(image, Exception):
        return {"image": name, "error": str(image)}, None
    start = time.perf_counter()
    try:
        result = predictor(image)
    except (MemoryError, torch.OutOfMemoryError):
        return {"image": name, "error": str(_too_large(name))}, None
    except (ImageError, InputError) as error:
        return {"image": name, "error": f"{name}: {error}"}, None
    seconds = round(time.perf_counter() - start, 4)
    return {"image": name, "width": image.shape[1], "height": image.shape[0], "seconds": seconds}, result


def _recorded(record: Record, written: Future | None, records: Records) -> Record:
    if written is not None:
        try:
            record |= written.result()
        except ImageError as error:
            if getattr(error.__cause__, "errno", None) in _STOPPING:
                raise
            record = {"image": record["image"], "error": str(error)}
    records.add(record)
    return record
