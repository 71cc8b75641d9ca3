"""Resizing of images as the reference did it, with the filter of each task."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

LONG_OVER_SHORT = 4  # images are fitted into 4 x short by short pixels (2048 x 512), however long they are


def fit_size(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """Scale (height, width), ratio kept, as large as `short` allows for the short side and `long` for the long one.

    Rounds as mmcv does (half up), but never to zero.
    """
    scale = min(long / max(height, width), short / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def resize_bilinear(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Resize (H,W,C) to size (height, width), bilinear without antialiasing: what mmseg's test pipeline does."""
    if tuple(image.shape[:2]) == tuple(size):
        return image
    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


def resize_area(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Resize (H,W,C) to size (height, width): averages areas where it shrinks, bilinear where it enlarges."""
    if tuple(image.shape[:2]) == tuple(size):
        return image
    shrinks = size[0] < image.shape[0] or size[1] < image.shape[1]
    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def resize_antialiased(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Resize (H,W,3) to size (height, width) with Pillow's bilinear filter: what torchvision does to PIL images."""
    if tuple(image.shape[:2]) == tuple(size):
        return image
    shape = (size[1], size[0])
    if image.dtype == np.uint8:
        return np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BILINEAR))
    channels = [Image.fromarray(image[..., i]).resize(shape, Image.Resampling.BILINEAR) for i in range(image.shape[2])]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)
