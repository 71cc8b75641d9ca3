"""What all data sets have in common: samples, and the calls that data sets answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from vpd_fast.errors import DatasetError, ImageError
from vpd_fast.files import read_text
from vpd_fast.labels import IGNORED
from vpd_fast.pictures.reading import read_image, to_uint8

MILLIMETRES = 1000.0  # stored depths to metres


Example = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One image as a data set has it, before any transform.

    image: (H,W,3) uint8 RGB.
    target: segmentation (H,W) uint8 class ids, 255 ignored; referring (H,W) uint8, 1 on the object; depth (H,W)
        float32 metres, 0 where it is unknown.
    name: unique within the data set.
    sentences: of a referring sample, at least one.
    scene: of a depth sample, an index into the data set's class_names; None if unknown.
    """

    image: np.ndarray
    target: np.ndarray
    name: str
    sentences: tuple[str, ...] = ()
    scene: int | None = None


Transform = Callable[[Sample, np.random.Generator, int], Example]  # of a sample at a position in the epoch


class Dataset(Protocol):
    """A data set of one task. class_names: classes of segmentation, scenes of depth, () of referring."""

    task: str
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return the name of a sample, without reading it."""
        ...

    def load(self, index: int) -> Sample:
        """Read a sample. Raises ImageError or DatasetError, naming the file."""
        ...


def read_rgb(path: Path) -> np.ndarray:
    """Read an image file as (H,W,3) uint8 RGB. Raises ImageError."""
    return to_uint8(read_image(path))


def read_integers(path: Path) -> np.ndarray:
    """Read a PNG of labels or millimetres as (H,W) integers: palette indices, 8 or 16 bits. Raises ImageError."""
    if not path.is_file():
        raise ImageError(f"{path}: cannot read the mask, the file does not exist")
    # Pillow keeps palette indices, which OpenCV would turn into colours; OpenCV reads 16 bits much faster.
    values = cv2.imread(str(path), cv2.IMREAD_UNCHANGED) if path.suffix.lower() == ".png" else None
    if values is None or values.ndim != 2 or _has_palette(path):
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as file:
                values = np.array(file)
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            raise ImageError(f"{path}: cannot read the mask ({error}); expected a PNG of one channel") from error
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
        raise ImageError(f"{path}: a mask of shape {values.shape} and {values.dtype}; expected one channel of integers")
    return values


def _has_palette(path: Path) -> bool:
    """Return whether byte 25, the colour type of a PNG, is 3."""
    with path.open("rb") as file:
        return file.read(26)[25:26] == b"\x03"


def check_same_size(image: np.ndarray, target: np.ndarray, name: str) -> None:
    """Raise DatasetError unless both have the same height and width."""
    if image.shape[:2] != target.shape[:2]:
        sizes = " and ".join(f"{a.shape[0]}x{a.shape[1]}" for a in (image, target))
        raise DatasetError(f"{name}: image and target must have the same size, got {sizes} pixels (height x width)")


def read_pair(image: Path, target: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read an image (H,W,3) uint8 and its labels or millimetres (H,W). Raises ImageError, DatasetError."""
    pixels, integers = read_rgb(image), read_integers(target)
    check_same_size(pixels, integers, str(image))
    return pixels, integers


def to_metres(millimetres: np.ndarray) -> np.ndarray:
    """Convert stored depths to float32 metres."""
    return millimetres.astype(np.float32) / np.float32(MILLIMETRES)


def check_labels(labels: np.ndarray, count: int, path: Path) -> None:
    """Raise DatasetError if a label is neither a class nor ignored."""
    valid = labels[labels != IGNORED]
    if valid.size and int(valid.max()) >= count:
        raise DatasetError(f"{path}: the mask has class {int(valid.max())}, but there are only {count} classes")


def check_class_count(names: Sequence[str], where: Path) -> None:
    """Raise DatasetError if there are so many classes that one would have the number of ignored pixels."""
    if len(names) > IGNORED:
        raise DatasetError(f"{where}: {len(names)} classes; expected at most {IGNORED}, since {IGNORED} is ignored")


def read_lines(path: Path, *, names: bool = False) -> list[str]:
    """Read the lines of a text file that are not blank, stripped; `names` of files need not be UTF-8.

    Raises DatasetError.
    """
    try:
        return [line.strip() for line in read_text(path, names=names).split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot read the list ({error}); expected text in UTF-8") from error


def require_folder(path: Path, what: str) -> Path:
    """Return the folder if it exists. Raises DatasetError that says what was looked for and what is there instead."""
    if path.is_dir():
        return path
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise DatasetError(f"{what}: {nearest} is a file, expected the folder {path}")
    inside = sorted(p.name for p in nearest.iterdir())
    found = ", ".join(inside[:8]) + (", ..." if len(inside) > 8 else "") if inside else "nothing"
    raise DatasetError(f"{what}: looked for the folder {path}; {nearest} has {found}")


def require_file(path: Path, what: str) -> Path:
    """Return the file if it exists. Raises DatasetError that says what was looked for and what is there instead."""
    if path.is_file():
        return path
    require_folder(path.parent, what)
    inside = sorted(p.name for p in path.parent.iterdir())
    found = ", ".join(inside[:8]) + (", ..." if len(inside) > 8 else "") if inside else "nothing"
    raise DatasetError(f"{what}: looked for the file {path}; the folder has {found}")
