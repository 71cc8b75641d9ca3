"""Pictures of one sample: the photo, what was predicted, what is true, and where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from PIL import Image

from vpd_fast.labels import IGNORED
from vpd_fast.pictures import canvas
from vpd_fast.pictures.palette import palette

LONGEST = 480  # pixels of a panel's longer side, whatever the image has
LEGEND_ROWS = 8
UNKNOWN = (44, 47, 54)  # pixels without a label
RIGHT, WRONG, MISSED = (70, 190, 120), (232, 72, 72), (72, 128, 240)
WORST_RELATIVE = 0.5  # relative error of the brightest colour


@dataclass(frozen=True)
class Drawing:
    """panels: (title, picture), all of one size. legend: (colour, name, value) rows. caption: a sentence."""

    panels: list[tuple[str, Image.Image]]
    legend: list[tuple[tuple[int, int, int], str, str]] = field(default_factory=list)
    caption: str = ""


def segmentation(image: np.ndarray, labels: np.ndarray, target: np.ndarray, names: Sequence[str]) -> Drawing:
    """Draw labels (H,W) beside the true ones, wrong pixels in red; the legend has the largest classes and their IoU."""
    photo = _photo(image)
    size = photo.shape[:2]
    found, wanted = canvas.sample_nearest(labels, size), canvas.sample_nearest(target, size)
    known = wanted != IGNORED
    wrong = labels != target
    share = wrong[target != IGNORED].mean()
    marked = _marked(photo, [(known & (found != wanted), WRONG)])
    marked[~known] = UNKNOWN
    return Drawing(
        [
            ("picture", Image.fromarray(photo)),
            ("prediction", _labelled(photo, found, np.ones_like(known), names)),
            ("ground truth", _labelled(photo, wanted, known, names)),
            (f"wrong: {percent(share)}", Image.fromarray(marked)),
        ],
        _class_legend(labels, target, names),
    )


def referring(image: np.ndarray, mask: np.ndarray, target: np.ndarray, sentence: str) -> Drawing:
    """Draw a mask beside the true one (bool, of any size), and where they differ."""
    photo = _photo(image)
    found, wanted = (canvas.sample_nearest(m.astype(bool), photo.shape[:2]) for m in (mask, target))
    errors = [(found & wanted, RIGHT), (found & ~wanted, WRONG), (~found & wanted, MISSED)]
    return Drawing(
        [
            ("picture", Image.fromarray(photo)),
            ("prediction", _masked(photo, found)),
            ("ground truth", _masked(photo, wanted)),
            ("difference", Image.fromarray(_marked(photo, errors))),
        ],
        [
            (RIGHT, "right", percent((mask & target).mean())),
            (WRONG, "too much", percent((mask & ~target).mean())),
            (MISSED, "missed", percent((~mask & target).mean())),
        ],
        sentence,
    )


def depth(image: np.ndarray, predicted: np.ndarray, target: np.ndarray, valid: np.ndarray) -> Drawing:
    """Draw depth (H,W) beside the true one in the same colours, and the relative error where measured (valid)."""
    photo = _photo(image)
    size = photo.shape[:2]
    near, far = float(target[valid].min()), float(target[valid].max())
    found, wanted, measured = (canvas.sample_nearest(values, size) for values in (predicted, target, valid))
    error = np.abs(found - wanted) / np.maximum(wanted, 1e-6) / WORST_RELATIVE
    errors = canvas.apply_colour_map(np.where(measured, error, 0), cv2.COLORMAP_MAGMA)
    errors[~measured] = UNKNOWN
    mean = float(np.mean(np.abs(predicted[valid] - target[valid]) / target[valid]))
    return Drawing(
        [
            ("picture", Image.fromarray(photo)),
            (f"prediction, {_metres(predicted[valid])}", _depth(found, np.ones(size, bool), near, far)),
            (f"ground truth, {_metres(target[valid])}", _depth(wanted, wanted > 0, near, far)),
            (f"relative error, mean {percent(mean)}", Image.fromarray(errors)),
        ],
        [
            (_colour(cv2.COLORMAP_INFERNO, 1), "near", f"{near:.2f} m"),
            (_colour(cv2.COLORMAP_INFERNO, 0.5), "middle", f"{(near + far) / 2:.2f} m"),
            (_colour(cv2.COLORMAP_INFERNO, 0), "far", f"{far:.2f} m"),
            (_colour(cv2.COLORMAP_MAGMA, 0.5), "error", percent(WORST_RELATIVE / 2)),
            (_colour(cv2.COLORMAP_MAGMA, 1), "error", f"{percent(WORST_RELATIVE)} or more"),
        ],
    )


def percent(share: float) -> str:
    """Format a fraction as people read it."""
    return f"{100 * share:.1f} %"


def _photo(image: np.ndarray) -> np.ndarray:
    return canvas.display_photo(image, longest=LONGEST)


def _labelled(photo: np.ndarray, labels: np.ndarray, known: np.ndarray, names: Sequence[str]) -> Image.Image:
    colours = palette(len(names))
    inside = np.where(known, labels, 0)
    blended = canvas.tint(photo, colours[inside], np.full((*labels.shape, 1), 0.65, np.float32))
    blended[canvas.label_borders(labels)] = 255
    blended[~known] = UNKNOWN
    picture = Image.fromarray(blended)
    canvas.name_regions(picture, np.where(known, labels, len(names)), (*names, ""))
    return picture


def _class_legend(
    labels: np.ndarray, target: np.ndarray, names: Sequence[str]
) -> list[tuple[tuple[int, int, int], str, str]]:
    valid = target != IGNORED
    found, wanted = labels[valid], target[valid]
    counts = [np.bincount(values, minlength=len(names)) for values in (found, wanted, wanted[found == wanted])]
    union = counts[0] + counts[1] - counts[2]
    largest: list[int] = [i for i in np.argsort(-union, kind="stable")[:LEGEND_ROWS].tolist() if union[i]]
    colours = palette(len(names))
    return [
        ((red, green, blue), names[i], f"IoU {percent(float(counts[2][i] / union[i]))}")
        for i, (red, green, blue) in zip(largest, colours[largest].tolist(), strict=True)
    ]


def _marked(photo: np.ndarray, regions: Sequence[tuple[np.ndarray, tuple[int, int, int]]]) -> np.ndarray:
    """Draw the photo in dark grey, regions in their colours."""
    picture = canvas.dark_grey(photo).astype(np.uint8)
    for mask, colour in regions:
        alpha = mask[..., None].astype(np.float32) * 0.75
        picture = canvas.tint(picture, np.array(colour), alpha)
    return picture


def _masked(photo: np.ndarray, mask: np.ndarray) -> Image.Image:
    colour = palette(1)[0]
    picture = np.where(mask[..., None], photo, photo.mean(2, keepdims=True) * 0.4).astype(np.uint8)
    picture = canvas.tint(picture, colour, mask[..., None].astype(np.float32) * 0.4)
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, outlines, -1, (255, 255, 255), 2, cv2.LINE_AA)
    return Image.fromarray(picture)


def _depth(metres: np.ndarray, known: np.ndarray, near: float, far: float) -> Image.Image:
    closeness = 1 - (np.nan_to_num(metres) - near) / max(far - near, canvas.LEAST_SPREAD)
    picture = canvas.apply_colour_map(closeness, cv2.COLORMAP_INFERNO)
    picture[~known] = UNKNOWN
    return Image.fromarray(picture)


def _metres(values: np.ndarray) -> str:
    return f"{float(values.min()):.2f} to {float(values.max()):.2f} m"


def _colour(colours: int, value: float) -> tuple[int, int, int]:
    return tuple(canvas.apply_colour_map(np.array([[value]], np.float32), colours)[0, 0].tolist())
