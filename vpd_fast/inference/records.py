"""Where the records of a run go: into results.json at its end, or line by line into results.jsonl at once.

Both sinks count what is done, failed and skipped. With `Records` memory does not grow with the images of a run; only a
resumed one remembers eight bytes for each image that is done.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO

from vpd_fast.errors import ImageError, InputError
from vpd_fast.files import write_files, write_json
from vpd_fast.inference.listing import Shard
from vpd_fast.inference.resuming import EARLIER, Record, digest, drop_cut_line, read_header, read_records
from vpd_fast.locking import RunLock, same_file

_LOCK = ".results"


class ResultsFile:
    """The records of a run in one JSON file: `header`, "images", and what `footer` returns.

    It is written when the `with` block ends, also after an interruption, unless there is no record. only: the run has a
    single image, whose error is raised as ImageError and not recorded. Raises ImageError where the file cannot be
    written, and at the end where files that were recorded are gone.
    """

    def __init__(
        self, path: Path, header: Record, *, only: bool = False, footer: Callable[[], Record] = lambda: {}
    ) -> None:
        self.path = path
        self.values: Record = {**header, "images": []}
        self.notes: list[str] = []
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

    def is_lost(self) -> bool:
        """Return False: the file is not there before the end."""
        return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.values["images"]:
            self.values |= self._footer()
            write_files({self.path: partial(write_json, values=self.values)}, ImageError)
        if kind is None:
            _require_files(self.path.parent, self.values["images"])


class Records:
    """A shard's records as JSON lines in `folder`, and the names of its failed images as text.

    header: the model and its options, the first line. resume: True goes on after what any shard of the folder recorded
    as done with the same header; False wants no earlier file. Each record is in the file before the next is made; a
    last line that was cut off is dropped. A file with other damage is kept as damaged-results.jsonl, and what is whole
    in it counts. notes: what was damaged.
    One run at a time writes a shard. Raises InputError where another one does, a file is in the way or has another
    header; ImageError where it cannot be written, and at the end of the `with` block where what was recorded is gone.
    """

    def __init__(self, folder: str | Path, shard: Shard, header: Record, resume: bool = False) -> None:
        self.path = Path(folder) / shard.file("results", ".jsonl")
        self.failed_path = Path(folder) / shard.file("failed", ".txt")
        self.notes: list[str] = []
        self._done: set[bytes] = set()
        self.done = self.failed = self.skipped = 0
        self._lock = RunLock(Path(folder) / shard.file(_LOCK, ".lock"))
        try:
            _require_no_other_split(Path(folder), shard)
            self._open(json.loads(json.dumps(header)), resume)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, header: Record, resume: bool) -> None:
        if resume:
            for path in sorted(self.path.parent.glob("results*.jsonl")):
                finished = read_records(path, header)
                self._done |= finished.done
                if finished.damaged:
                    aside = f"kept as {finished.set_aside().name}" if path == self.path else "which are left alone"
                    self.notes.append(f"{path}: {finished.damage()}; {aside}")
            drop_cut_line(self.path)
        elif self.path.exists():
            raise InputError(f"{self.path} exists: --resume goes on from it, or choose another folder")
        try:
            # One line at a time: what is recorded survives the process.
            self._file = self.path.open("a", encoding="utf-8", buffering=1)
            self._failures = self.failed_path.open("w", encoding="utf-8", errors="backslashreplace", buffering=1)
        except OSError as error:
            raise InputError(f"{error.filename}: cannot be written ({error.strerror})") from error
        if self._file.tell() == 0:
            self._put(self._file, json.dumps({"header": header}))
        self._start = self._size = self._file.tell()

    def is_done(self, name: str) -> bool:
        """Return whether an earlier run finished this image."""
        return bool(self._done) and digest(name) in self._done

    def add(self, record: Record) -> None:
        """Write one: {"image": name, ...}, with "error" if it failed. Raises ImageError, also if the file is gone."""
        if self.is_lost():
            raise ImageError(f"{self.path}: was removed, moved or replaced while the run went on; it ends here")
        line = json.dumps(record)
        self._put(self._file, line)
        self._size += len(line) + 1
        if "error" in record:
            self.failed += 1
            self._put(self._failures, f"{json.dumps(record['image'])}\t{' '.join(record['error'].split())}")
        else:
            self.done += 1

    def is_lost(self) -> bool:
        """Return whether the file is no longer where it was made: its folder was removed or moved."""
        return not same_file(self._file.fileno(), self.path)

    def _put(self, file: IO[str], line: str) -> None:
        try:
            file.write(line + "\n")
        except OSError as error:
            raise ImageError(f"{file.name}: cannot be written ({error.strerror}); what it has is kept") from error

    def _verify(self) -> None:
        """Raise ImageError unless what this run recorded is there, records and files."""
        if self.is_lost() or self.path.stat().st_size < self._size:
            raise ImageError(f"{self.path}: was removed, replaced or shortened while the run went on")
        with self.path.open("rb") as file:
            file.seek(self._start)
            _require_files(self.path.parent, (json.loads(line) for line in file))

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._verify()
        finally:
            with contextlib.suppress(OSError):
                self._file.close()
            with contextlib.suppress(OSError):
                self._failures.close()
            if not self.failed:
                self.failed_path.unlink(missing_ok=True)
            self._lock.release()


Sink = ResultsFile | Records  # what `predict_images` puts records into


def _require_no_other_split(folder: Path, shard: Shard) -> None:
    """Raise InputError while runs that split the images otherwise write into the folder: both would do all of them."""
    own = re.compile(rf"\{_LOCK}-\d+-of-{shard.count:05d}\.lock" if shard.count > 1 else rf"\{_LOCK}\.lock")
    for path in folder.glob(f"{_LOCK}*.lock"):
        if not own.fullmatch(path.name):
            RunLock(path).release()  # also removes what a killed run left


def _require_files(folder: Path, records: Iterable[Record]) -> None:
    """Raise ImageError unless the files of all records are in the folder."""
    missing, count, first = 0, 0, ""
    for record in records:
        for name in record.get("files", ()):
            count += 1
            if not os.path.exists(os.path.join(folder, name)):
                missing, first = missing + 1, first or name
    if missing:
        raise ImageError(
            f"{folder}: {missing} of the {count} files that this run wrote are not there any more, {first} among them"
        )


def recorded(folder: Path) -> Record:
    """Return the header of an earlier run in the folder, with what earlier versions did not say; {} without a run."""
    for path in sorted(folder.glob("results*.jsonl")):
        header = read_header(path)
        if header is not None:
            return {**EARLIER, **header}
    return {}
