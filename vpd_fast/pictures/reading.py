"""Reading images of every kind a person may have, as RGB arrays or tensors."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vpd_fast.errors import ImageError, InputError
from vpd_fast.pictures.decoding import check_size, decoding, open_image, printable
from vpd_fast.pictures.pillow_limits import MAX_PIXELS as MAX_PIXELS

EXPECTED = (
    "expected a file path, a PIL image, an array (H,W), (H,W,1), (H,W,3) or (H,W,4), or a tensor (3,H,W) or (1,H,W); "
    "uint8, uint16 (arrays), or floats in [0,1]"
)
RANGE_SLACK = 1e-3  # resizing filters overshoot [0, 1] by rounding; more than this is another value range

_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def read_image(source: Any, name: str | None = None, *, exif: bool = True) -> np.ndarray:
    """Return the image as an RGB array (H, W, 3): uint8 for a source of 8 bits, float32 in [0, 1] for more.

    source: a path (str or Path), a PIL image, an array (H,W), (H,W,1), (H,W,3) or (H,W,4) of uint8, uint16 or floats in
    [0, 1], or a tensor (3,H,W) or (1,H,W) of uint8 or floats in [0, 1]. The EXIF orientation of files and PIL images is
    applied; grey becomes RGB; transparency is composited on white; of several frames the first is taken.
    name: how error messages call the source; by default its path or its type.
    exif: False leaves the pixels as they are stored, whatever the EXIF orientation.

    Raises ImageError for images that cannot be read, are empty, have more than MAX_PIXELS pixels, a wrong shape, dtype
    or value range, or NaN, whatever a decoder raises; InputError for a source that is no image at all.
    """
    if isinstance(source, str | Path):
        name = name or printable(source)
        with open_image(Path(source), name) as image:
            return _from_pil(image, name, exif)
    if isinstance(source, Image.Image):
        name = name or f"PIL image of mode {source.mode}"
        with decoding(name):
            return _from_pil(source, name, exif)
    if isinstance(source, torch.Tensor | np.ndarray):
        name = name or ("array" if isinstance(source, np.ndarray) else "tensor")
        with decoding(name):
            return _from_array(source if isinstance(source, np.ndarray) else _channels_last(source, name), name)
    raise InputError(f"{name or 'source'}: cannot take a {type(source).__name__} as an image; {EXPECTED}")


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Return an image from `read_image` with 8 bits, for display."""
    if image.dtype == np.uint8:
        return image
    return np.rint(image * 255).astype(np.uint8)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """Return an image from `read_image` as a float32 tensor (1, 3, H, W) in [0, 1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
    return tensor.float() / 255 if image.dtype == np.uint8 else tensor


def turned(image: Image.Image) -> Image.Image:
    """Return a decoded image as its EXIF orientation wants it to be shown."""
    orientation = None
    # A malformed EXIF block tells nothing about the orientation; the pixels are still good.
    with suppress(Exception):
        orientation = image.getexif().get(_ORIENTATION)
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _from_pil(image: Image.Image, name: str, exif: bool) -> np.ndarray:
    check_size(image.height, image.width, name)
    image.load()
    check_size(image.height, image.width, name)  # of icons the decoder says another size than the header
    if exif:
        image = turned(image)
    if image.mode.startswith(("I", "F")):  # 16- and 32-bit grey
        return _from_array(_wide_grey(image, name), name)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        return _from_array(np.asarray(image.convert("RGBA")), name)
    return np.array(image.convert("RGB"))


def _wide_grey(image: Image.Image, name: str) -> np.ndarray:
    array = np.asarray(image)
    if image.mode != "I":
        return array if image.mode == "F" else array.astype(np.uint16)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535:
        raise ImageError(f"{name}: 32-bit grey values {low}..{high}; expected 0..65535")
    return array.astype(np.uint16)


def _channels_last(tensor: torch.Tensor, name: str) -> np.ndarray:
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        kind = f"{'nested' if tensor.is_nested else tensor.layout}, on {tensor.device}"
        raise ImageError(f"{name}: a tensor ({kind}) without pixels in memory; expected a dense one")
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        raise ImageError(
            f"{name}: a tensor of shape {tuple(tensor.shape)}; expected (3,H,W) or (1,H,W), a list for several images"
        )
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise ImageError(f"{name}: a tensor of {tensor.dtype}; expected uint8 or floats in [0,1]")
    tensor = tensor.detach().cpu().resolve_neg()
    return (tensor if tensor.dtype == torch.uint8 else tensor.float()).permute(1, 2, 0).numpy()


def _from_array(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ImageError(f"{name}: an array of shape {array.shape}; expected (H,W), (H,W,1), (H,W,3) or (H,W,4)")
    check_size(array.shape[0], array.shape[1], name)
    if array.dtype == np.uint16:
        array = array.astype(np.float32) / 65535
    elif np.issubdtype(array.dtype, np.floating):
        array = _checked_floats(array, name)
    elif array.dtype != np.uint8:
        raise ImageError(f"{name}: an array of {array.dtype}; expected uint8, uint16 or floats in [0,1]")
    if array.shape[2] == 4:
        array = _on_white(array)
    elif array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    return np.ascontiguousarray(array)


def _checked_floats(array: np.ndarray, name: str) -> np.ndarray:
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageError(f"{name}: the image contains NaN or infinity; expected floats in [0,1]")
    if low < -RANGE_SLACK or high > 1 + RANGE_SLACK:
        raise ImageError(f"{name}: float values from {low:.4g} to {high:.4g}; expected floats in [0,1]")
    return np.clip(array.astype(np.float32), 0, 1)


def _on_white(rgba: np.ndarray) -> np.ndarray:
    if rgba.dtype == np.uint8:
        image = Image.fromarray(rgba)
        return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image))[..., :3]
    alpha = rgba[..., 3:]
    return rgba[..., :3] * alpha + (1 - alpha)
