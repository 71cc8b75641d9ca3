"""Reading pictures whose values are numbers, not colours: class ids, objects, depths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vpd_fast.errors import ImageError
from vpd_fast.pictures.decoding import open_image, printable
from vpd_fast.pictures.reading import turned

FORMATS = ("PNG", "TIFF", "BMP", "DIB", "PPM")  # which keep numbers as they are; GIF writers renumber palettes
_LOSSY = ("jpeg", "tiff_jpeg", "webp")  # compressions of TIFF
# Pillow spreads grey of 2 and 4 bits over 0..255, which is how it looks, not what was stored.
_SPREAD = {"L;2": 85, "L;2R": 85, "L;4": 17, "L;4R": 17}
_COLOURS = {"RGB": 3, "RGBA": 3, "LA": 1, "PA": 1}  # channels without alpha


def read_mask(path: Path, *, exif: bool = False) -> np.ndarray:
    """Return what a picture of class ids or depths stores, (H,W) integers of at least 8 bits.

    Grey of 1, 2, 4, 8, 16 or 32 bits comes as the stored numbers (of 1 bit, white is 1), a palette as its indices, RGB
    as one channel where all three are equal. exif: turn it by an EXIF orientation of its own.

    Raises ImageError for files that cannot be read, have more than MAX_PIXELS pixels, different channels, transparent
    pixels or fractions, or are of a format that does not keep numbers.
    """
    name = printable(path)
    with open_image(path, name, "mask") as image:
        if image.format not in FORMATS or image.info.get("compression") in _LOSSY:
            raise ImageError(
                f"{name}: {image.format} may change numbers, such as class ids; expected a mask in "
                f"{', '.join(FORMATS)}, best a PNG of one channel"
            )
        decoder, stored = _encoding(image)
        image.load()
        if exif:
            image = turned(image)
        if image.mode in _COLOURS:
            values = _high_depth(path, name) if ";16" in stored else np.asarray(image)
            values = _one_channel(values, _COLOURS[image.mode], image.mode, name)
        elif image.mode in ("1", "L", "P") or image.mode.startswith("I"):
            values = np.array(image)
        else:
            raise ImageError(f"{name}: a mask of mode {image.mode}; expected one channel of integers")
        if image.mode.startswith("I;16"):
            return values.astype(np.uint16)
        if stored.startswith("L;") and "I" in stored:
            raise ImageError(
                f"{name}: a TIFF in which 0 is white, where class ids may be inverted; expected one in which 0 is black"
            )
        return _as_stored(values, decoder, stored, image)


def _encoding(image: Image.Image) -> tuple[Any, str]:
    """Return the decoder's (name, arguments) and Pillow's name of the samples' layout, such as "L;4"."""
    tiles: Any = getattr(image, "tile", None)
    if not tiles:
        return ("", ()), image.mode
    decoder, _, _, arguments = tiles[0]
    if isinstance(arguments, str):
        arguments = (arguments,)
    layout = arguments[0] if arguments and isinstance(arguments[0], str) else image.mode
    return (decoder, arguments), layout


def _as_stored(values: np.ndarray, decoder: Any, layout: str, image: Image.Image) -> np.ndarray:
    """Undo what Pillow does to numbers that they look right."""
    name, arguments = decoder
    if image.mode == "1":
        return values.astype(np.uint8)
    if name in ("ppm", "ppm_plain"):  # 0..maximum was spread over 8 or 16 bits
        maximum, full = arguments[-1], 65535 if image.mode == "I" else 255
        if maximum > full:
            raise ImageError(f"colours of 0 to {maximum}, of which Pillow drops bits; expected one channel")
        return np.rint(values.astype(np.float64) * maximum / full).astype(np.int32 if full > 255 else np.uint8)
    return values // _SPREAD[layout] if layout in _SPREAD else values


def _high_depth(path: Path, name: str) -> np.ndarray:
    """Decode several channels of 16 bits, of which Pillow drops the lower 8."""
    import cv2

    values = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.ndim != 3:
        raise ImageError(f"{name}: a mask of several channels of 16 bits; expected one channel of integers")
    return values


def _one_channel(values: np.ndarray, colours: int, mode: str, name: str) -> np.ndarray:
    """Return the channel of (H,W,channels), if all colours are equal and nothing is transparent."""
    colours = min(colours, values.shape[2])
    first = values[..., 0]
    if any((values[..., i] != first).any() for i in range(1, colours)):
        raise ImageError(
            f"{name}: a mask of mode {mode} whose channels differ; expected one channel of class ids (or a palette), "
            "not colours"
        )
    if values.shape[2] > colours and (values[..., colours:] != np.iinfo(values.dtype).max).any():
        raise ImageError(f"{name}: a mask with transparent pixels; expected one channel of integers")
    return np.ascontiguousarray(first)
