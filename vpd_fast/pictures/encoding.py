"""Pictures as the bytes of files, by whatever encodes fastest: `python benchmarks/encoders.py` compares them.

Numbers, such as labels and depths, become PNGs here: Intel's isal compresses them several times as fast as the zlib in
Pillow and OpenCV. Without that package Python's zlib takes its place.
"""

from __future__ import annotations

import importlib
import io
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vpd_fast.errors import ImageError

JPEG_QUALITY = 92  # at which borders of classes, legends and names look as they were drawn
_GREY, _PALETTE = 0, 3  # kinds of colour of PNG
_NO_FILTER, _SUB = 0, 1  # before each row: the numbers as they are, or their differences to the left


def encode_numbers(numbers: np.ndarray, palette: np.ndarray | None = None) -> bytes:
    """Return numbers (H,W), uint8 or uint16, as the bytes of a PNG file of as many bits.

    palette: colours (n,3) uint8 of uint8 numbers, n at most 256, with which the file is shown; grey without.
    """
    height, width = numbers.shape
    rows = np.empty((height, 1 + numbers.itemsize * width), np.uint8)
    if numbers.dtype == np.uint16:
        wide = np.ascontiguousarray(numbers, ">u2").view(np.uint8)
        rows[:, 0], rows[:, 1:3] = _SUB, wide[:, :2]
        np.subtract(wide[:, 2:], wide[:, :-2], out=rows[:, 3:])
    else:
        rows[:, 0], rows[:, 1:] = _NO_FILTER, numbers
    colour = _GREY if palette is None else _PALETTE
    header = struct.pack(">IIBBBBB", width, height, 8 * numbers.itemsize, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", _deflate(rows.tobytes())), (b"IEND", b"")]
    if palette is not None:
        chunks.insert(1, (b"PLTE", palette.tobytes()))
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in chunks:
        parts += [struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))]
    return b"".join(parts)


@cache
def _isal() -> Any:
    try:
        return importlib.import_module("isal.isal_zlib")
    except ImportError:
        return None


def _deflate(data: bytes) -> bytes:
    isal = _isal()
    if isal is not None:
        return isal.compress(data, 1)
    # Runs of equal numbers, which is what labels have; differences of depths have little else than frequent ones.
    compressor = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    return compressor.compress(data) + compressor.flush()


def encode_png(picture: Image.Image) -> bytes:
    """Return a Pillow image as the bytes of a PNG file."""
    data = io.BytesIO()
    picture.save(data, format="PNG", compress_level=1)  # higher ones take several times as long for a tenth less
    return data.getvalue()


def encode_jpeg(picture: Image.Image) -> bytes:
    """Return an RGB picture as the bytes of a JPEG file, colours at full resolution."""
    data = io.BytesIO()
    picture.save(data, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return data.getvalue()


ENCODERS = {".png": encode_png, ".jpg": encode_jpeg}


def encode(picture: Image.Image, path: Path) -> bytes:
    """Return a picture as the bytes of the kind of file that the ending of a path says. Raises ImageError."""
    encoder = ENCODERS.get(path.suffix.lower())
    if encoder is None:
        raise ImageError(f"{path}: pictures are written as {' or '.join(ENCODERS)}, got the ending {path.suffix!r}")
    return encoder(picture)
