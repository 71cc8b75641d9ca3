"""Where results go: folders, and checks before a run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from vpd_fast.errors import ImageError, InputError


def check_output(folder: Path, sources: Iterable[str], images: str | None) -> None:
    """Raise InputError where results would land in a folder among the sources, or in the one that has the images."""
    place = folder.resolve()
    for source in map(Path, sources):
        if source.is_dir() and (place == source.resolve() or source.resolve() in place.parents):
            raise InputError(f"--output {folder}: is in {source}, where images are looked for; choose another folder")
    if images is not None and place == Path(images).resolve():
        raise InputError(f"--output {folder}: has the images, which results could overwrite; choose another folder")


def check_not_overwritten(folder: Path, stems: Iterable[str], suffixes: Sequence[str], images: Iterable[str]) -> None:
    """Raise InputError if a file that would be written, a stem with a suffix, is one of the images."""
    inputs = {Path(image).resolve() for image in images}
    for stem in stems:
        for suffix in suffixes:
            if (folder / (stem + suffix)).resolve() in inputs:
                raise InputError(
                    f"--output {folder}: {stem + suffix} there is one of the images; choose another folder"
                )


def make_folder(folder: Path) -> None:
    """Make a folder for results. Raises ImageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageError(f"{folder}: cannot make the folder ({error.strerror or error})") from error


def prepare_output(folder: Path, option: str = "--output") -> None:
    """Make the folder and make sure that files can be written there. Raises InputError, which names the option."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{option} {folder}: cannot write there ({error.strerror or error})") from error


def check_output_file(option: str, path: Path | None, suffix: str) -> None:
    """Check that the file can be written, before hours are spent. Raises InputError, which names the option."""
    if path is None:
        return
    if path.suffix.lower() != suffix or path.is_dir():
        raise InputError(f"{option} must be a file name that ends in {suffix}, got {str(path)!r}")
    prepare_output(path.parent, option)
