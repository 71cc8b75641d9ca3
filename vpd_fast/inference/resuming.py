"""What an earlier run recorded, read back to go on from, however it ended and whatever became of the file since."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vpd_fast.errors import ImageError, InputError
from vpd_fast.files import write_files

Record = dict[str, Any]
# How results are named: "short" is cat.png for cat.jpg, "full" is a/cat.jpg.png.
NAMES = "names"
SHORT, FULL = "short", "full"
OVERLAY = "overlay"  # the kind of pictures to look at
EARLIER = {NAMES: FULL, OVERLAY: "png"}  # what headers that do not say so mean: those of earlier versions


@dataclass
class Finished:
    """What a file of records says is done: digests of the images' names. damaged: numbers of lines that say nothing."""

    path: Path
    done: set[bytes] = field(default_factory=set)
    damaged: list[int] = field(default_factory=list)

    def damage(self) -> str:
        """Return what is wrong with the file, for a note."""
        if self.damaged[0] == 1:
            return "its first line, which says what it holds, is damaged, so its images are predicted again"
        lines, more = ", ".join(map(str, self.damaged[:5])), "" if len(self.damaged) <= 5 else ", ..."
        return f"{len(self.damaged)} damaged line{'' if len(self.damaged) == 1 else 's'} ({lines}{more})"

    def set_aside(self) -> Path:
        """Keep the file under another name, and put its whole lines in its place. Returns the other name."""
        aside, count = self.path.with_name(f"damaged-{self.path.name}"), 1
        while aside.exists():
            count += 1
            aside = self.path.with_name(f"damaged-{count}-{self.path.name}")
        try:
            if self.damaged[0] == 1:
                os.replace(self.path, aside)
            else:
                shutil.copyfile(self.path, aside)
                write_files({self.path: self._write_whole_lines})
        except OSError as error:
            raise InputError(f"{aside}: cannot be written ({error.strerror or error})") from error
        return aside

    def _write_whole_lines(self, path: Path) -> None:
        damaged = set(self.damaged)
        with self.path.open("rb") as source, path.open("wb") as file:
            file.writelines(line for number, line in enumerate(source, 1) if number not in damaged)


def read_records(path: Path, header: Record) -> Finished:
    """Read a file of records. A last line without end is being written, or was cut off. Raises InputError for another
    run's header."""
    found = Finished(path)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                record = _parse(line)
                if number == 1:
                    before = record.get("header")
                    if not isinstance(before, dict):
                        found.damaged.append(1)
                        break
                    _check_header(path, before, header)
                elif not isinstance(record.get("image"), str):
                    found.damaged.append(number)
                elif "error" not in record:
                    found.done.add(digest(record["image"]))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return found


def read_header(path: Path) -> Record | None:
    """Return the header of a file of records, None where it has none."""
    try:
        with path.open("rb") as file:
            header = _parse(file.readline()).get("header")
    except OSError:
        return None
    return header if isinstance(header, dict) else None


def digest(name: str) -> bytes:
    """Return eight bytes that stand for the name of an image."""
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _parse(line: bytes) -> Record:
    """Return the JSON object of a line, {} if it is none."""
    try:
        record = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _check_header(path: Path, header: Record, expected: Record) -> None:
    before, now = ({**EARLIER, **values} for values in (header, expected))
    changes = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changes:
        changed = "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in changes)
        raise InputError(
            f"{path} is of another run ({changed}); resume with the same options, or choose another folder"
        )


def drop_cut_line(path: Path) -> None:
    """Cut a file after its last line end. Raises ImageError."""
    if not path.exists():
        return
    try:
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
    except OSError as error:
        raise ImageError(f"{path}: cannot be written ({error.strerror})") from error
