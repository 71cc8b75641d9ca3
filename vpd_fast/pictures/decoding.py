"""The one place that opens image files, and the one that turns what decoders raise into ImageError."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from vpd_fast.errors import ImageError, VPDFastError
from vpd_fast.pictures.pillow_limits import MAX_PIXELS, pillow_limits

# Pillow imports its decoders when a file is opened. A process that is forked while a thread does so waits for ever when
# it imports them itself.
Image.init()

REFUSED = ("EPS",)  # for which Pillow runs another program, Ghostscript, with the file's path
TOO_LARGE = "not enough memory for an image of this size"
MAX_NAME = 240  # characters of a path in messages
MAX_REASON = 200  # characters of a decoder's message


def printable(name: object) -> str:
    """Return a path or name as text that can be written: bytes that are no UTF-8 as escapes, the middle of long ones
    left out.
    """
    text = str(name).encode("utf-8", "backslashreplace").decode("utf-8")
    if len(text) <= MAX_NAME:
        return text
    return f"{text[: MAX_NAME // 2]}...{text[-MAX_NAME // 2 :]}"


def reason(error: BaseException) -> str:
    """Return what a decoder or the file system complains about, in one short line."""
    if isinstance(error, MemoryError):
        return TOO_LARGE
    if isinstance(error, Image.DecompressionBombError):
        return f"it has too many pixels; the limit is {MAX_PIXELS} pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = printable(" ".join(str(error).split()))[:MAX_REASON]
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}".removesuffix(": ")


@contextmanager
def decoding(name: str, what: str = "image") -> Iterator[None]:
    """Turn whatever is raised inside, but the errors of this package, into an ImageError that names the image.

    Decoders and plug-ins raise what they like (ValueError, struct.error, RuntimeError, ...), so there is no list.
    """
    try:
        with pillow_limits():
            yield
    except VPDFastError:
        raise
    except Exception as error:
        raise ImageError(
            f"{name}: cannot read the {what} ({reason(error)}); expected a readable, complete image file"
        ) from error


@contextmanager
def open_image(path: Path, name: str, what: str = "image") -> Iterator[Image.Image]:
    """Yield an image file, not decoded yet, of at most MAX_PIXELS pixels. Raises ImageError, also for what is raised
    inside.

    The file is opened here and decoders get its bytes: some C libraries end the process for paths that are no UTF-8.
    """
    with decoding(name, what):
        if not path.is_file():
            state = "is a folder" if path.is_dir() else "is no file" if path.exists() else "does not exist"
            raise ImageError(f"{name}: cannot read the {what}, the path {state}; expected an image file")
        with path.open("rb") as file, _identify(file, name, what) as image:
            check_size(image.height, image.width, name)
            yield image


def check_size(height: int, width: int, name: str) -> None:
    """Raise ImageError unless there is a pixel, and at most MAX_PIXELS of them."""
    if height < 1 or width < 1:
        raise ImageError(f"{name}: the image is empty ({height}x{width} pixels); expected at least 1x1")
    if height * width > MAX_PIXELS:
        raise ImageError(f"{name}: {height}x{width} pixels are too many; the limit is {MAX_PIXELS} pixels")


@dataclass(frozen=True)
class _Plugin:
    """A package that lets Pillow read a format. brands: of ISO media files in that format. register: a function of
    `module` to call after the import, if there is one."""

    format: str
    brands: tuple[bytes, ...]
    module: str
    package: str
    register: str | None = None


_PLUGINS = (
    _Plugin("AVIF", (b"avif", b"avis"), "pillow_avif", "pillow-avif-plugin"),
    _Plugin(
        "HEIC", (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
        "pillow_heif", "pillow-heif", "register_heif_opener",
    ),
)  # fmt: skip


def _identify(file: BinaryIO, name: str, what: str) -> Image.Image:
    try:
        return _pillow_open(file)
    except UnidentifiedImageError as error:
        size = file.seek(0, 2)
        file.seek(0)
        plugin = _plugin_for(file.read(64))
        if plugin is None:
            state = "the file is empty" if size == 0 else f"its {size} bytes are of no known image format"
            raise ImageError(
                f"{name}: cannot read the {what}, {state}; expected a JPEG, PNG or other image file"
            ) from error
    try:
        module = importlib.import_module(plugin.module)
    except ImportError as error:
        raise ImageError(
            f"{name}: cannot read the {what}, Pillow needs {plugin.package} for {plugin.format} files: "
            f"pip install {plugin.package}"
        ) from error
    if plugin.register is not None:
        getattr(module, plugin.register)()
    file.seek(0)
    return _pillow_open(file)


def _pillow_open(file: BinaryIO) -> Image.Image:
    return Image.open(file, formats=[name for name in Image.ID if name not in REFUSED])


def _plugin_for(head: bytes) -> _Plugin | None:
    """Return the plug-in for a file that begins with an ISO media file's "ftyp" box of one of its brands."""
    if head[4:8] != b"ftyp":
        return None
    length = int.from_bytes(head[:4], "big")
    brands = {head[8:12], *(head[i : i + 4] for i in range(16, min(length, len(head)), 4))}
    return next((plugin for plugin in _PLUGINS if brands.intersection(plugin.brands)), None)
