"""Which images a run predicts on, how they and their results are called, and the shard of a process."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from vpd_fast.errors import InputError
from vpd_fast.files import lines_of_names
from vpd_fast.pictures import IMAGE_SUFFIXES

STDIN = "-"
NO_IMAGES = f"no images ({' '.join(IMAGE_SUFFIXES)})"


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

    Hidden files and folders are left out. Linked folders are entered, each folder once, by the first of its names.
    Raises InputError where a folder cannot be read.
    """
    for place, names in _walk(folder, recursive):
        for name in names:
            if not name.startswith(".") and name.lower().endswith(suffixes):
                yield os.path.join(place, name)


def _walk(folder: str, recursive: bool = True) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder, the sorted names of its files) of a folder and those below it; none twice, so that links that lead
    in a circle end. Raises InputError."""

    def unreadable(error: OSError) -> None:
        raise InputError(f"{error.filename}: the folder cannot be read ({error.strerror})")

    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        about = os.stat(place)
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(name for name in folders if recursive and not name.startswith("."))
        yield place, sorted(names)


def _matches(pattern: str) -> list[str]:
    """Return the sorted paths that a glob matches. What "**" stands for are the folders that `walk_images` enters:
    glob's own follows links in circles."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return sorted(glob.iglob(pattern))
    at = parts.index("**")
    above, below = os.sep.join(parts[:at]), os.sep.join(parts[at + 1 :]) or "*"
    bases = _matches(above) if glob.has_magic(above) else [above]
    if at == 1 and not parts[0]:
        bases = [os.sep]
    found: set[str] = set()
    for base in bases:
        for place, _ in _walk(base or os.curdir) if os.path.isdir(base or os.curdir) else ():
            inside = place if base else os.path.relpath(place)
            inside = "" if inside == os.curdir else glob.escape(inside)
            found.update(_matches(os.path.join(inside, below)))
    return sorted(found)


def read_list(lines: Iterable[str]) -> Iterator[str]:
    """Yield the paths of a list, one per line; empty lines and those that begin with "#" are left out."""
    for line in lines:
        path = line.strip().lstrip("\ufeff")  # a byte order mark, also of lists that were joined
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


@dataclass(frozen=True)
class Naming:
    """The one rule for names of results: `cat` for cat.jpg, or `a/cat.jpg` for a/cat.jpg below the root.

    short: the images are all in one folder, and no two of them would write the same file without their endings.
    base: the folder that names of images are relative to. total: how many images there are, None if not known. folder:
    the one that images are in where names are short.
    """

    short: bool
    root: str
    base: str
    total: int | None
    folder: str = ""

    def stem(self, name: str) -> str:
        """Return the path of an image's results below the output folder, to which endings such as ".png" are added."""
        if self.short:
            return os.path.splitext(os.path.basename(name))[0]
        return relative_name(os.path.join(self.base, name), self.root)


@dataclass(frozen=True)
class Listing:
    """The images that files, folders, quoted globs and the lines of a list name; listed anew each time.

    list_file: "-" for standard input. root: results keep the folders below it; None: the only folder given, else the
    current one, or where that does not hold them all, the one that does.
    at_scale: for any number of images: nothing is kept of one when the next is listed. Otherwise an image that is named
    twice is listed once, and each folder must have images.
    """

    sources: Sequence[str]
    list_file: str | None = None
    recursive: bool = False
    root: Path | None = None
    at_scale: bool = False

    @property
    def base(self) -> str:
        """The absolute path of the root, as far as it is known before images are listed."""
        only_folder = len(self.sources) == 1 and os.path.isdir(self.sources[0])
        return os.path.abspath(self.root or (self.sources[0] if only_folder else "."))

    def paths(self) -> Iterator[str]:
        """Yield the paths of the images, as given or below what is given. Raises InputError where there is none."""
        listed = False
        seen: set[str] = set()
        for source, paths in self._groups():
            group = False
            for path in paths:
                listed = group = True
                if self.at_scale:
                    yield path
                elif (actual := os.path.realpath(path)) not in seen:
                    seen.add(actual)
                    yield path
            if not group and not self.at_scale:
                raise InputError(f"{NO_IMAGES} in {source}{self._below([source])}")
        if not listed:
            place = self.list_file or " ".join(self.sources)
            raise InputError(f"{NO_IMAGES} in {place}{self._below(self.sources)}")

    def _below(self, sources: Iterable[str]) -> str:
        """Return what an error says where only the subfolders of `sources` have images, which were not entered."""
        for source in () if self.recursive else filter(os.path.isdir, sources):
            try:
                if next(walk_images(source, IMAGE_SUFFIXES), None) is not None:
                    return f" itself; subfolders of {source} have some, which only a recursive listing enters"
            except InputError:  # a subfolder that cannot be read is not what went wrong
                continue
        return ""

    def _groups(self) -> Iterator[tuple[str, Iterable[str]]]:
        """Yield (what was given, the paths of its images)."""
        if self.list_file is not None:
            yield self.list_file, (os.path.join(self.base, line) for line in self._lines(self.list_file))
        for source in self.sources:
            if os.path.isdir(source):
                yield source, walk_images(os.path.normpath(source), IMAGE_SUFFIXES, self.recursive)
            elif os.path.exists(source):
                yield source, [source]
            elif glob.has_magic(source):
                yield source, [p for p in _matches(source) if p.lower().endswith(IMAGE_SUFFIXES) and os.path.isfile(p)]
            else:
                raise InputError(f"{source} does not exist; expected image files, folders or globs")

    @staticmethod
    def _lines(list_file: str) -> Iterator[str]:
        if list_file == STDIN:
            binary = getattr(sys.stdin, "buffer", None)
            yield from read_list(sys.stdin if binary is None else lines_of_names(binary))
            return
        try:
            with open(list_file, "rb") as file:
                yield from read_list(lines_of_names(file))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"--list {list_file}: cannot be read ({reason})") from error

    def naming(self, marks: Sequence[str]) -> Naming:
        """Look at all images once and choose the names of their results.

        marks: what is put between an image's name and the ending of a file, such as "_overlay": cat_overlay.jpg must
        not write the overlay of cat.jpg. Raises InputError where there is no image, or one is not below the root.
        """
        base = self.base
        if not os.path.isdir(base):
            raise InputError(f"--root {base}: not a folder")
        if self.list_file == STDIN:
            return Naming(False, base, base, None)
        total, short, stems = 0, True, set[str]()
        first = common = ""
        for path in self.paths():
            folder, file = os.path.split(os.path.abspath(path))
            first, common = first or folder, os.path.commonpath((common or folder, folder))
            total += 1
            stem = os.path.splitext(file)[0].casefold()  # some file systems fold case
            short = short and folder == first and stem not in stems
            if short:
                stems.add(stem)
        inside = os.path.commonpath((base, common)) == base
        if not inside and self.root is not None:
            relative_name(common, base)  # which says that it is outside
        root = base if inside else common
        short = short and (self.root is None or first == base)
        short = short and not any(stem + mark in stems for stem in stems for mark in marks)
        return Naming(short, root, root if self.at_scale else os.getcwd(), total, first)

    def images(self, naming: Naming, shard: Shard) -> Iterator[tuple[str, str]]:
        """Yield (name, path) of the shard's images; the name is the path as given, at scale that below the root."""
        for path in shard.take(self.paths()):
            yield (relative_name(os.path.abspath(path), naming.base) if self.at_scale else path), path
