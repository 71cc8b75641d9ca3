"""What all data sets have in common: samples, and the calls that data sets answer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vpd_fast.errors import DatasetError, InputError, VPDFastError
from vpd_fast.files import read_text
from vpd_fast.labels import IGNORED
from vpd_fast.pictures.decoding import printable, reason
from vpd_fast.pictures.masks import read_mask
from vpd_fast.pictures.reading import read_image, to_uint8

MILLIMETRES = 1000.0  # stored depths to metres
# JSON can hold halves of characters, which no tokenizer and no file takes.
_SURROGATE = re.compile("[\ud800-\udfff]")

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
    """A data set of one task. class_names: classes of segmentation, scenes of depth, () of referring.

    It may have `notes`, lines for people on what it left out; see `notes_of`.
    """

    task: str
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return the name of a sample, without reading it."""
        ...

    def load(self, index: int) -> Sample:
        """Read a sample. Raises ImageError or DatasetError, naming the file."""
        ...


def notes_of(dataset: Dataset) -> list[str]:
    """Return what whoever uses the data set must know: files and records that were left out, with their number."""
    return list(getattr(dataset, "notes", ()))


def left_out(names: Sequence[object], why: str) -> list[str]:
    """Return a note that so many files or records were left out, the first named; none where there are none."""
    return [f"{len(names)} left out: {printable(why)}; the first: {printable(names[0])}"] if names else []


def usable_sentences(values: Any) -> tuple[tuple[str, ...], int]:
    """Return the sentences in a value of a data set's file, and how many were no text or empty.

    values: a list of texts, or one text, which is one sentence; of anything else nothing is usable.
    """
    if isinstance(values, str):
        values = [values]
    if not isinstance(values, list | tuple):
        return (), 0
    # A lone surrogate, which JSON can hold, is no text that a tokenizer or a file takes.
    good = tuple(
        v for v in values if isinstance(v, str) and v.strip() and not any("\ud800" <= c <= "\udfff" for c in v)
    )
    return good, len(values) - len(good)


def load_sample(dataset: Dataset, index: int) -> Sample | VPDFastError:
    """Read a sample, or return why it cannot be read, whatever its data set raises: one sample never ends a run.

    Errors that are not of this package become a DatasetError with the sample's name.
    """
    try:
        return dataset.load(index)
    except VPDFastError as error:
        return error
    except Exception as cause:
        error = DatasetError(f"{dataset.name(index)}: the sample cannot be read ({reason(cause)})")
        error.__cause__ = cause
        return error


def failure(dataset: Dataset, index: int, error: BaseException) -> tuple[str, str]:
    """Return the name of a sample that failed and why, in one line."""
    return dataset.name(index), " ".join(str(error).split()) or type(error).__name__


def read_rgb(path: Path, exif: bool = True) -> np.ndarray:
    """Read an image file as (H,W,3) uint8 RGB, turned by its EXIF orientation or as stored. Raises ImageError."""
    return to_uint8(read_image(path, exif=exif))


def check_same_size(image: np.ndarray, target: np.ndarray, name: str) -> None:
    """Raise DatasetError unless both have the same height and width."""
    if image.shape[:2] != target.shape[:2]:
        sizes = " and ".join(f"{a.shape[0]}x{a.shape[1]}" for a in (image, target))
        raise DatasetError(f"{name}: image and target must have the same size, got {sizes} pixels (height x width)")


def read_pair(image: Path, target: Path, exif: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Read an image (H,W,3) uint8 and what is stored for its pixels (H,W), integers. Raises ImageError, DatasetError.

    exif: whether the image is turned by its EXIF orientation. Targets are read as stored: tools that turn the image to
    annotate it draw a mask without an orientation.
    """
    pixels, integers = read_rgb(image, exif), read_mask(target)
    check_same_size(pixels, integers, printable(image))
    return pixels, integers


def check_depth_scale(scale: float | None) -> float | None:
    """Return the option, stored units per metre (1000: millimetres). Raises InputError unless it is above 0 or None."""
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if scale is None or (number and math.isfinite(scale) and scale > 0):
        return scale
    raise InputError(f"depth_scale must be units per metre, above 0 (1000 for millimetres), got {scale!r}")


def to_metres(stored: np.ndarray, path: Path, scale: float | None) -> np.ndarray:
    """Convert stored depths to float32 metres. scale: units per metre; None: millimetres, which take 16 bits.

    Raises DatasetError for depths of 8 bits without a scale and for negative ones.
    """
    if scale is None and stored.dtype.itemsize == 1:
        raise DatasetError(
            f"{printable(path)}: depths of 8 bits, which end at {np.iinfo(stored.dtype).max} millimetres; expected 16 "
            "bits, or the option depth_scale, units per metre"
        )
    if stored.size and int(stored.min()) < 0:
        raise DatasetError(f"{printable(path)}: a negative depth, {int(stored.min())}; expected 0 where it is unknown")
    return stored.astype(np.float32) / np.float32(MILLIMETRES if scale is None else scale)


def check_labels(labels: np.ndarray, count: int, path: Path) -> None:
    """Raise DatasetError if a label is neither a class nor ignored."""
    valid = labels[labels != IGNORED]
    if not valid.size:
        return
    low, high = int(valid.min()), int(valid.max())
    if low < 0 or high >= count:
        label = low if low < 0 else high
        raise DatasetError(f"{printable(path)}: the mask has class {label}, but there are only {count} classes")


def check_flags(**flags: Any) -> None:
    """Raise InputError for options that are not true or false."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise InputError(f"{name} must be true or false, got {value!r}")


def check_class_names(names: Sequence[str] | None) -> None:
    """Raise InputError for class names that are one text, whose letters would be taken for classes."""
    if isinstance(names, str):
        raise InputError(f"classes must be a list of names, got the text {names!r}")


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
