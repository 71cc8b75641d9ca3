"""Where the records of a run go: into results.json at its end, or line by line into results.jsonl at once.

Both sinks count what is done, failed and skipped. With `Records` memory does not grow with the images of a run; only a
resumed one remembers eight bytes for each image that is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from vpd_fast.errors import ImageError, InputError
from vpd_fast.files import write_files, write_json
from vpd_fast.inference.listing import Shard

Record = dict[str, Any]
# How results are named: "short" is cat.png for cat.jpg; "full", also that of files that do not say, is a/cat.jpg.png.
NAMES = "names"
SHORT, FULL = "short", "full"


class ResultsFile:
    """The records of a run in one JSON file: `header`, "images", and what `footer` returns.

    It is written when the `with` block ends, also after an interruption, unless there is no record. only: the run has a
    single image, whose error is raised as ImageError and not recorded. Raises ImageError where the file cannot be
    written.
    """

    def __init__(
        self, path: Path, header: Record, *, only: bool = False, footer: Callable[[], Record] = lambda: {}
    ) -> None:
        self.path = path
        self.values: Record = {**header, "images": []}
        self.done = self.failed = self.skipped = 0
        self._only, self._footer = only, footer

    def is_done(self, name: str) -> bool:
        """Return False: the file is made anew."""
        return False

    def add(self, record: Record) -> None:
        """Keep a record. Raises ImageError for the error of an only image."""
        if "error" in record and self._only:
            raise ImageError(record["error"])
        self.values["images"].append(record)
        self.failed += "error" in record
        self.done += "error" not in record

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.values["images"]:
            self.values |= self._footer()
            write_files({self.path: partial(write_json, values=self.values)}, ImageError)


class Records:
    """A shard's records as JSON lines in `folder`, and the names of its failed images as text.

    header: the model and its options, the first line. resume: True goes on after what any shard of the folder recorded
    as done with the same header; False wants no earlier file. Each record is on disk before the next is made; a
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
            self._failures = self.failed_path.open(
                "w", encoding="utf-8", errors="surrogateescape", buffering=1
            )  # those are tried again
        except OSError as error:
            raise InputError(f"{error.filename}: cannot be written ({error.strerror})") from error
        if self._file.tell() == 0:
            self._put(self._file, json.dumps({"header": header}))

    def is_done(self, name: str) -> bool:
        """Return whether an earlier run finished this image."""
        return bool(self._done) and _digest(name) in self._done

    def add(self, record: Record) -> None:
        """Write one: {"image": name, ...}, with "error" if it failed. Raises ImageError."""
        self._put(self._file, json.dumps(record))
        if "error" in record:
            self.failed += 1
            self._put(self._failures, f"{json.dumps(record['image'])}\t{' '.join(record['error'].split())}")
        else:
            self.done += 1

    def _put(self, file: IO[str], line: str) -> None:
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


Sink = ResultsFile | Records  # what `predict_images` puts records into


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def _finished(path: Path, header: Record) -> set[bytes]:
    """Return the digests of the names that a file records as done. Raises InputError for another header."""
    digests: set[bytes] = set()
    number = 1
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith("\n"):
                    break  # cut off, or being written
                record = json.loads(line)
                if number == 1:
                    _check_header(path, record.get("header"), header)
                elif "error" not in record:
                    digests.add(_digest(record["image"]))
    except (ValueError, KeyError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}, line {number}: not a record of results ({error})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return digests


def recorded_names(folder: Path) -> str | None:
    """Return how the results of an earlier run in the folder are named, SHORT or FULL; None where there is none."""
    for path in sorted(folder.glob("results*.jsonl")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError), path.open(encoding="utf-8-sig") as file:
            return json.loads(file.readline())["header"].get(NAMES, FULL)
    return None


def _check_header(path: Path, header: Any, expected: Record) -> None:
    if not isinstance(header, dict):
        raise InputError(f"{path}: its first line does not say what it holds")
    before, now = ({NAMES: FULL, **values} for values in (header, expected))
    changes = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changes:
        changed = "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in changes)
        raise InputError(
            f"{path} is of another run ({changed}); resume with the same options, or choose another folder"
        )


def _drop_cut_line(path: Path) -> None:
    """Cut a file after its last line end."""
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
