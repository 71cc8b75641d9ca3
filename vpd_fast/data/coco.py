"""Objects as COCO stores them, polygons and run-length codes, as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from vpd_fast.errors import DatasetError, MissingDependencyError
from vpd_fast.pictures.decoding import reason

MIN_COORDINATES = 6  # of a polygon: fewer than three points have no area
MAX_OUTSIDE = 4  # times the longer side: pycocotools takes memory for every pixel that an edge passes


def require_pycocotools() -> Any:
    """Return pycocotools.mask. Raises MissingDependencyError."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise MissingDependencyError('RefCOCO needs pycocotools: pip install "vpd_fast[train]"') from error
    return mask


def object_layers(segmentation: Any, height: int, width: int, name: str) -> np.ndarray:
    """Return how many polygons of an object cover each pixel, (H,W) integers; of a run-length code 0 or 1.

    segmentation: a list of polygons [x, y, x, y, ...] or {"size": [height, width], "counts": lengths or COCO's text}.
    Polygons of fewer than three points are left out. Raises DatasetError, naming the object, if nothing is left, for
    coordinates that are no numbers or far outside, and for codes that do not fill the image.
    """
    try:
        if isinstance(segmentation, dict):
            return _runs(segmentation, height, width)
        polygons = [_polygon(points, MAX_OUTSIDE * max(height, width)) for points in segmentation]
        polygons = [points for points in polygons if len(points) >= MIN_COORDINATES]
        if not polygons:
            raise ValueError("none has three points")
        masks = require_pycocotools()
        # One at a time: of a list, pycocotools takes the format of the first element for that of all.
        codes = [masks.frPyObjects([points], height, width)[0] for points in polygons]
        return masks.decode(codes).sum(2)
    except MissingDependencyError:
        raise
    except Exception as error:  # whatever is in the file, and whatever pycocotools raises
        raise DatasetError(f"{name}: no polygon and no RLE of {height}x{width} pixels ({reason(error)})") from error


def _polygon(points: Any, limit: float) -> list[float]:
    values = np.asarray(points, np.float64)
    if values.ndim != 1 or len(values) % 2:
        raise ValueError(f"a polygon of shape {values.shape}; expected x, y, x, y, ...")
    if not (np.abs(values) <= limit).all():
        raise ValueError(f"a coordinate that is no number or beyond {limit:g}")
    return values.tolist()


def _runs(code: dict[str, Any], height: int, width: int) -> np.ndarray:
    """Decode runs of zeros and ones, in turn, down the columns."""
    counts = code["counts"]
    if isinstance(counts, str | bytes):
        counts = _lengths(counts.encode("ascii") if isinstance(counts, str) else counts)
    lengths = np.asarray(counts, np.int64)
    if list(code["size"]) != [height, width]:
        raise ValueError(f"a code of size {code['size']}")
    # pycocotools would leave what the runs do not fill as it was in memory.
    if lengths.ndim != 1 or (lengths < 0).any() or int(lengths.sum()) != height * width:
        raise ValueError(f"runs that do not fill {height * width} pixels")
    return np.repeat(np.arange(len(lengths)) % 2, lengths).reshape(width, height).T


def _lengths(text: bytes) -> list[int]:
    """Decode COCO's text: five bits a character, a sixth says that more follow; from the fourth number on differences
    to the last but one.
    """
    lengths: list[int] = []
    value = shift = 0
    for byte in text:
        bits = byte - 48
        if not 0 <= bits < 64:
            raise ValueError("a code with other characters than COCO's")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("a code that ends within a number")
    return lengths
