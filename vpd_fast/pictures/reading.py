"""Reading images of every kind a person may have, as RGB arrays or tensors."""

from __future__ import annotations

import struct
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from vpd_fast.errors import ImageError, InputError

MAX_PIXELS = 2**28  # 16384 x 16384; Pillow's own limit would refuse at 179 and warn at 89 million pixels
EXPECTED = (
    "expected a file path, a PIL image, an array (H,W), (H,W,1), (H,W,3) or (H,W,4), or a tensor (3,H,W) or (1,H,W); "
    "uint8, uint16 (arrays), or floats in [0,1]"
)
RANGE_SLACK = 1e-3  # resizing filters overshoot [0, 1] by rounding; more than this is another value range

_pillow_limit_lock = threading.Lock()


def read_image(source: Any, name: str | None = None) -> np.ndarray:
    """Return the image as an RGB array (H, W, 3): uint8 for a source of 8 bits, float32 in [0, 1] for more.

    source: a path (str or Path), a PIL image, an array (H,W), (H,W,1), (H,W,3) or (H,W,4) of uint8, uint16 or floats in
    [0, 1], or a tensor (3,H,W) or (1,H,W) of uint8 or floats in [0, 1]. The EXIF orientation of files and PIL images is
    applied; grey becomes RGB; transparency is composited on white; of several frames the first is taken.
    name: how error messages call the source; by default its path or its type.

    Raises ImageError for images that cannot be read, are empty, have more than MAX_PIXELS pixels, a wrong shape, dtype
    or value range, or NaN; InputError for a source that is no image at all.
    """
    if isinstance(source, str | Path):
        return _from_file(Path(source), name or str(source))
    if isinstance(source, Image.Image):
        return _from_pil(source, name or f"PIL image of mode {source.mode}")
    if isinstance(source, torch.Tensor):
        return _from_array(_channels_last(source, name or "tensor"), name or "tensor")
    if isinstance(source, np.ndarray):
        return _from_array(source, name or "array")
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


def _check_size(height: int, width: int, name: str) -> None:
    if height < 1 or width < 1:
        raise ImageError(f"{name}: the image is empty ({height}x{width} pixels); expected at least 1x1")
    if height * width > MAX_PIXELS:
        raise ImageError(f"{name}: {height}x{width} pixels are too many; the limit is {MAX_PIXELS} pixels")


def _open(path: Path) -> Image.Image:
    # Pillow checks its limit, a module variable, in open() only. It is raised to ours for just that call.
    with _pillow_limit_lock, warnings.catch_warnings():
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _from_file(path: Path, name: str) -> np.ndarray:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ImageError(f"{name}: cannot read the image, the path {what}; expected an image file")
    try:
        with _open(path) as image:
            return _from_pil(image, name)
    except UnidentifiedImageError as error:
        size = path.stat().st_size
        what = "the file is empty" if size == 0 else f"its {size} bytes are of no known image format"
        raise ImageError(f"{name}: cannot read the image, {what}; expected a JPEG, PNG or other image file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: the image has too many pixels; the limit is {MAX_PIXELS} pixels") from error
    except (OSError, SyntaxError, EOFError, struct.error) as error:
        raise ImageError(
            f"{name}: cannot read the image ({error}); expected a readable, complete image file"
        ) from error


def _from_pil(image: Image.Image, name: str) -> np.ndarray:
    _check_size(image.height, image.width, name)
    # A malformed EXIF block tells nothing about the orientation; the pixels are still good.
    with suppress(SyntaxError, TypeError, ValueError, KeyError, struct.error):
        image = ImageOps.exif_transpose(image)
    try:
        if image.mode.startswith(("I", "F")):  # 16- and 32-bit grey
            return _from_array(_wide_grey(image, name), name)
        if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
            return _from_array(np.asarray(image.convert("RGBA")), name)
        return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, EOFError, struct.error, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name}: cannot convert the image to RGB ({error})") from error


def _wide_grey(image: Image.Image, name: str) -> np.ndarray:
    array = np.asarray(image)
    if image.mode != "I":
        return array if image.mode == "F" else array.astype(np.uint16)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535:
        raise ImageError(f"{name}: 32-bit grey values {low}..{high}; expected 0..65535")
    return array.astype(np.uint16)


def _channels_last(tensor: torch.Tensor, name: str) -> np.ndarray:
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        raise ImageError(
            f"{name}: a tensor of shape {tuple(tensor.shape)}; expected (3,H,W) or (1,H,W), a list for several images"
        )
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise ImageError(f"{name}: a tensor of {tensor.dtype}; expected uint8 or floats in [0,1]")
    tensor = tensor.detach().cpu()
    return (tensor if tensor.dtype == torch.uint8 else tensor.float()).permute(1, 2, 0).numpy()


def _from_array(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ImageError(f"{name}: an array of shape {array.shape}; expected (H,W), (H,W,1), (H,W,3) or (H,W,4)")
    _check_size(array.shape[0], array.shape[1], name)
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
