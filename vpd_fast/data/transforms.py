"""From samples to what a model trains on: the original's augmentation for each task, on OpenCV and numpy.

All random numbers come from the generator that is passed in.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import cv2
import numpy as np
from PIL import Image

from vpd_fast.data.colors import jitter, photometric_distortion
from vpd_fast.data.sample import MILLIMETRES, Example, Sample, Transform
from vpd_fast.errors import InputError
from vpd_fast.labels import IGNORED
from vpd_fast.pictures.resizing import LONG_OVER_SHORT, fit_size, resize_antialiased, resize_bilinear
from vpd_fast.tasks import TASKS

CROPS = 10  # how often segmentation tries for a crop that one class does not fill
CUT_EVERY = 4  # samples of depth
CUT_SHARE = 0.75  # of what is to the right of a cut's left edge, at most
CUTS = ("reference", "scaled", "none")


def make_transform(task: str, *, train: bool = True, size: int, **settings: Any) -> Transform:
    """Return a function from (sample, generator, position in the epoch) to a dict of arrays and values.

    segmentation: image float32 (3,size,size) in [-1,1], target int64 (size,size), 255 ignored.
        settings: ratio_range=(0.5, 2.0), cat_max_ratio=0.75, flip=0.5, photometric=True.
    referring: image float32 (3,size,size) in [-1,1], target int64 (size,size), sentence, one at random. No settings:
        the original augments nothing.
    depth: image float32 (3,size,size) in [0,1], target float32 (size,size) metres, class_id, -1 if unknown.
        settings: flip=0.5, color=True, cut_depth="reference": "reference" writes the depth in millimetres, modulo 256,
        over columns of every fourth image, "scaled" writes it as a share of 10 metres, "none" nothing.
    train: False: nothing is random; image and target are resized to size x size.

    Raises InputError.
    """
    if task not in TASKS:
        raise InputError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InputError(f"size must be a positive number of pixels, got {size!r}")
    function = {"segmentation": _segmentation, "referring": _referring, "depth": _depth}[task]
    known = SETTINGS[task]
    unknown = settings.keys() - known.keys()
    if unknown:
        has = f"has {', '.join(known)}" if known else "has none"
        raise InputError(f"the transform of {task} {has}, got {', '.join(sorted(unknown))}")
    chosen = {**known, **settings}
    if chosen.get("cut_depth", "none") not in CUTS:
        raise InputError(f"cut_depth must be one of {', '.join(CUTS)}, got {chosen['cut_depth']!r}")
    return partial(function, size=size, train=train, **chosen)


SETTINGS: dict[str, dict[str, Any]] = {
    "segmentation": {"ratio_range": (0.5, 2.0), "cat_max_ratio": 0.75, "flip": 0.5, "photometric": True},
    "referring": {},
    "depth": {"flip": 0.5, "color": True, "cut_depth": "reference"},
}


def _segmentation(
    sample: Sample,
    rng: np.random.Generator,
    position: int,
    *,
    size: int,
    train: bool,
    ratio_range: tuple[float, float],
    cat_max_ratio: float,
    flip: float,
    photometric: bool,
) -> Example:
    image, target = sample.image, sample.target
    if train:
        image, target = scale(image, target, rng.uniform(*ratio_range), size)
        top, left = crop_corner(target, size, cat_max_ratio, rng)
        image, target = (x[top : top + size, left : left + size] for x in (image, target))
        if rng.random() < flip:
            image, target = image[:, ::-1], target[:, ::-1]
        if photometric:
            image = photometric_distortion(np.ascontiguousarray(image), rng)
    else:
        image, target = resize_bilinear(image, (size, size)), resize_nearest(target, (size, size))
    below, right = size - image.shape[0], size - image.shape[1]
    # Padding comes after normalisation: it is mid-grey.
    pixels = np.pad(signed(image), ((0, 0), (0, below), (0, right)))
    labels = np.pad(target.astype(np.int64), ((0, below), (0, right)), constant_values=IGNORED)
    return {"image": pixels, "target": labels}


def _referring(sample: Sample, rng: np.random.Generator, position: int, *, size: int, train: bool) -> Example:
    mask = Image.fromarray(sample.target).resize((size, size), Image.Resampling.NEAREST)
    return {
        "image": signed(resize_antialiased(sample.image, (size, size))),
        "target": np.asarray(mask).astype(np.int64),
        "sentence": sample.sentences[int(rng.integers(len(sample.sentences))) if train else 0],
    }


def _depth(
    sample: Sample,
    rng: np.random.Generator,
    position: int,
    *,
    size: int,
    train: bool,
    flip: float,
    color: bool,
    cut_depth: str,
) -> Example:
    image, depth = sample.image, sample.target
    if train:
        rows, columns = depth.shape
        if min(rows, columns) < size:  # enlarged until the crop fits, depths as well
            # In integers: a product of fractions may come out one pixel short of the crop.
            shape = (rows * size // min(rows, columns), columns * size // min(rows, columns))
            image, depth = resize_bilinear(image, shape), resize_bilinear(depth, shape)
        if cut_depth != "none" and position % CUT_EVERY == 0:
            image = cut(image, depth, rng.random(), rng.random(), scaled=cut_depth == "scaled")
        if rng.random() < flip:
            image, depth = image[:, ::-1], depth[:, ::-1]
        top, left = (int(rng.integers(side - size + 1)) for side in depth.shape)
        image, depth = (x[top : top + size, left : left + size] for x in (image, depth))
        if color:
            image = jitter(np.ascontiguousarray(image), rng)
    else:
        image, depth = resize_bilinear(image, (size, size)), resize_nearest(depth, (size, size))
    return {
        "image": np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32) / 255,
        "target": np.ascontiguousarray(depth, np.float32),
        "class_id": -1 if sample.scene is None else sample.scene,
    }


def signed(image: np.ndarray) -> np.ndarray:
    """Convert (H,W,3) uint8 to (3,H,W) float32 in [-1,1]."""
    pixels = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32)
    return (pixels - np.float32(127.5)) * np.float32(1 / 127.5)


def scale(image: np.ndarray, target: np.ndarray, ratio: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Resize, keeping the ratio of sides, to fit 4 * size by size pixels times `ratio`: mmsegmentation's Resize."""
    height, width = target.shape
    shape = fit_size(height, width, int(size * ratio), int(LONG_OVER_SHORT * size * ratio))
    return resize_bilinear(image, shape), resize_nearest(target, shape)


def resize_nearest(target: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resize (H,W) to shape (height, width), nearest as OpenCV does it."""
    return cv2.resize(target, (shape[1], shape[0]), interpolation=cv2.INTER_NEAREST)


def crop_corner(target: np.ndarray, size: int, cat_max_ratio: float, rng: np.random.Generator) -> tuple[int, int]:
    """Return (top, left) of a crop of at most size x size: of ten, the first with two classes of which none has
    cat_max_ratio of the labelled pixels, else the eleventh. mmsegmentation's RandomCrop.
    """

    def draw() -> tuple[int, int]:
        top, left = (int(rng.integers(max(side - size, 0) + 1)) for side in target.shape)
        return top, left

    corner = draw()
    for _ in range(CROPS if cat_max_ratio < 1 else 0):
        labels = target[corner[0] : corner[0] + size, corner[1] : corner[1] + size]
        counts = np.unique(labels[labels != IGNORED], return_counts=True)[1]
        if len(counts) > 1 and counts.max() / counts.sum() < cat_max_ratio:
            break
        corner = draw()
    return corner


def cut(image: np.ndarray, depth: np.ndarray, start: float, share: float, *, scaled: bool = False) -> np.ndarray:
    """Put depth in place of colour in some columns: CutDepth (Ishii and Yamashita, 2021).

    image (H,W,3) uint8, depth (H,W) metres; start, share in [0,1): where the columns begin, and how far they go.
    The original writes millimetres into bytes, where they wrap around; scaled: 255 is 10 metres.
    """
    width = image.shape[1]
    first = int(start * width)
    last = first + int(max((width - start * width) * share * CUT_SHARE, 1))
    columns = depth[:, first:last]
    values = np.clip(columns / 10, 0, 1) * 255 if scaled else np.rint(columns * MILLIMETRES).astype(np.int64) % 256
    image = image.copy()
    image[:, first:last] = values.astype(np.uint8)[..., None]
    return image
