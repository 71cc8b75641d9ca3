"""Which images a run predicts on and how they are called: walks of folders, lists, and the shard of a process."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from vpd_fast.errors import InputError


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
        """Parse "I/N", I counted from 0. Raises InputError."""
        try:
            index, count = (int(part) for part in text.split("/"))
        except ValueError:
            raise InputError(f"a shard is I/N, part I (from 0) of N, got {text!r}") from None
        return cls(index, count)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Shard:
        """Return the shard of RANK and WORLD_SIZE, which torchrun sets; without them all images. Raises InputError."""
        return cls.parse(f"{environment.get('RANK', '0')}/{environment.get('WORLD_SIZE', '1')}")

    def take(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield every `count`-th of `items`, from number `index` on."""
        return islice(items, self.index, None, self.count)

    def file(self, stem: str, suffix: str) -> str:
        """Return a file name that no other shard has: "results.jsonl", or "results-00002-of-00008.jsonl"."""
        part = "" if self.count == 1 else f"-{self.index:05d}-of-{self.count:05d}"
        return f"{stem}{part}{suffix}"


def walk_images(folder: str, suffixes: tuple[str, ...], recursive: bool = True) -> Iterator[str]:
    """Yield the paths of a folder's images, with its subfolders if `recursive`; always in the same order.

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
    """Yield the paths of a list, one per line; empty lines and those that begin with "#" are left out."""
    for line in lines:
        path = line.strip()
        if path and not path.startswith("#"):
            yield path


def relative_name(path: str, root: str) -> str:
    """Return the name of an image in results: its path below `root`, an absolute path, with "/" between folders.

    Raises InputError for an image outside.
    """
    inside = os.path.relpath(os.path.join(root, path), root)
    if inside == os.pardir or inside.startswith(os.pardir + os.sep) or os.path.isabs(inside):
        raise InputError(f"{path} is not in {root}; results keep the folders below it, so choose another root")
    return inside.replace(os.sep, "/")
