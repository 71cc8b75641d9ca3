"""Which images to read, where to write, and under which names."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from vpd_fast.errors import ImageError, InputError
from vpd_fast.files import write_files
from vpd_fast.pictures import IMAGE_SUFFIXES


def collect_images(sources: Sequence[str]) -> list[Path]:
    """The image files that files, folders (not their subfolders) and globs name, each once, in the order given.

    Raises InputError for a path that does not exist, and for a glob or folder without images.
    """
    found: dict[Path, Path] = {}
    for source in sources:
        path = Path(source)
        if path.is_dir():
            files = _images(path.iterdir())
            problem = f"no images ({' '.join(IMAGE_SUFFIXES)}) in the folder {source}"
        elif path.exists():
            files, problem = [path], ""
        elif glob.has_magic(source):
            files = _images(Path(match) for match in glob.iglob(source, recursive=True))
            problem = f"no images ({' '.join(IMAGE_SUFFIXES)}) match {source}"
        else:
            files, problem = [], f"{source} does not exist; expected image files, folders or globs"
        if not files:
            raise InputError(problem)
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _images(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def output_stems(images: Sequence[Path], output: Path, suffixes: Sequence[str]) -> list[str]:
    """A name without extension for each image such that no two write the same file, nor overwrite an image.

    suffixes: what is written for cat.jpg, as "cat" + suffix: (".png", "_overlay.png") for example. An image whose name
    is taken becomes "cat_2", "cat_3", ... Raises InputError if a file to be written is one of the images.
    """
    inputs = {image.resolve() for image in images}
    taken: set[str] = set()
    stems = []
    for image in images:
        number, stem = 1, image.stem
        while taken & (names := {(stem + suffix).casefold() for suffix in suffixes}):  # some file systems fold case
            number += 1
            stem = f"{image.stem}_{number}"
        overwritten = [stem + suffix for suffix in suffixes if (output / (stem + suffix)).resolve() in inputs]
        if overwritten:
            raise InputError(f"--output {output}: {overwritten[0]} there is one of the images; choose another folder")
        taken |= names
        stems.append(stem)
    return stems


def prepare_output(folder: Path, option: str = "--output") -> None:
    """Make the folder and make sure that files can be written there. Raises InputError, which names the option."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{option} {folder}: cannot write there ({error.strerror or error})") from error


def write_file(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` make a file, which appears when it is complete. Raises ImageError when that fails."""
    try:
        write_files({path: write})
    except OSError as error:
        raise ImageError(f"{path}: cannot write the file ({error.strerror or error})") from error
    return path
