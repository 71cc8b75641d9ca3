"""Metrics of the three tasks as accumulators: exact counts and sums, which add up the same in any order.

All are fractions between 0 and 1 except rmse, which is in metres (sq_rel too, log10 in decades, rmse_log and silog in
nats). Nothing here touches a model or a file. Arrays come in, numbers go out.

Compared once on random arrays (2, 5 and 150 classes, ignored pixels, empty masks, NaN and infinite depths, all crops):
the pixel counts are those of `intersect_and_union` in mmsegmentation 1.2.2 and its IoU and accuracy differ by at most
6e-8, intersections, unions and precisions are those of VPD's `computeIoU` loop (commit 92095ab) and the mean IoU
differs by 1e-16, and depth differs from VPD's `cropping_img` and `eval_depth` by at most 1.4e-7, relative: theirs add
up in float32, these in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vpd_fast.config import VPDConfig
from vpd_fast.errors import InputError
from vpd_fast.labels import IGNORED
from vpd_fast.tasks import TASKS

# What decides which of two models is the better one, and whether more or less of it is better.
PRIMARY = {name: (task.metric, task.better) for name, task in TASKS.items()}

PRECISION_AT = (0.5, 0.6, 0.7, 0.8, 0.9)
DEPTH_METRICS = ("d1", "d2", "d3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog")
NYU_SIZE = (480, 640)
# Rows and columns that are measured: pixels of NYUv2's only size, fractions of KITTI's several ones.
_NYU_EIGEN = (45, 471, 41, 601)
_KITTI = {
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
    "kitti_eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
}
CROPS = ("eigen", "none", *_KITTI)


class ExactSum:
    """A sum of finite floats that is rounded only once, when it is asked for: the order of the terms never matters."""

    def __init__(self) -> None:
        self._parts: list[float] = []  # do not overlap; see Shewchuk 1997, "Adaptive precision arithmetic"

    def add(self, value: float) -> None:
        """Add one term."""
        kept = 0
        for part in self._parts:
            large, small = (value, part) if abs(value) >= abs(part) else (part, value)
            value = large + small
            rest = small - (value - large)
            if rest:
                self._parts[kept] = rest
                kept += 1
        self._parts[kept:] = [value]

    def merge(self, other: ExactSum) -> None:
        """Add the terms of another sum."""
        for part in list(other._parts):
            self.add(part)

    def total(self) -> float:
        """Return the sum, correctly rounded."""
        return math.fsum(self._parts)


class SegmentationMetrics:
    """Accumulates pixel counts per class: intersection, prediction and label area, over pixels that have a label.

    num_classes: labels are 0 to num_classes - 1. ignore_index: pixels with this label count nowhere but in `ignored`.
    """

    def __init__(self, num_classes: int, ignore_index: int = IGNORED) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.images = self.ignored = 0
        self.intersection, self.predicted, self.labelled = (np.zeros(num_classes, np.int64) for _ in range(3))

    def update(self, labels: np.ndarray, target: np.ndarray) -> dict[str, Any] | None:
        """Count one image: predicted and true labels (H,W), integers. Returns its own mIoU, aAcc and valid pixels.

        None, and only ignored pixels are counted, if no pixel has a label. Raises InputError for labels beyond the
        classes.
        """
        _same_size(labels, target)
        valid = target != self.ignore_index
        found, wanted = labels[valid], target[valid]
        if not wanted.size:
            self.ignored += target.size
            return None
        for values, what in ((found, "predicted labels"), (wanted, "labels")):
            if values.min() < 0 or values.max() >= self.num_classes:
                raise InputError(
                    f"{what} from {values.min()} to {values.max()}; expected 0 to {self.num_classes - 1}, "
                    f"or {self.ignore_index} for pixels without a label"
                )
        intersection, predicted, labelled = (
            np.bincount(values, minlength=self.num_classes) for values in (wanted[found == wanted], found, wanted)
        )
        self.images += 1
        self.ignored += target.size - wanted.size
        self.intersection += intersection
        self.predicted += predicted
        self.labelled += labelled
        union = predicted + labelled - intersection
        here = union > 0
        return {
            "mIoU": float(np.mean(intersection[here] / union[here])),
            "aAcc": float(intersection.sum() / wanted.size),
            "pixels": int(wanted.size),
        }

    def merge(self, other: SegmentationMetrics) -> None:
        """Add what another accumulator counted. Raises InputError if it counts other classes."""
        if (other.num_classes, other.ignore_index) != (self.num_classes, self.ignore_index):
            raise InputError(
                f"cannot add counts of {other.num_classes} classes (ignored: {other.ignore_index}) to counts of "
                f"{self.num_classes} (ignored: {self.ignore_index})"
            )
        self.images += other.images
        self.ignored += other.ignored
        self.intersection += other.intersection
        self.predicted += other.predicted
        self.labelled += other.labelled

    def compute(self) -> dict[str, float]:
        """Return mIoU over classes in labels or predictions, aAcc over pixels, mAcc over classes with labels.

        NaN before the first image.
        """
        iou, accuracy = self._ratios()
        total = int(self.labelled.sum())
        return {
            "mIoU": _nanmean(iou),
            "aAcc": float(self.intersection.sum() / total) if total else math.nan,
            "mAcc": _nanmean(accuracy),
        }

    def per_class(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return a row per class: its IoU and accuracy (None where they are undefined) and its labelled pixels."""
        iou, accuracy = self._ratios()
        return [
            {
                "index": i,
                "class": names[i],
                "IoU": None if math.isnan(iou[i]) else float(iou[i]),
                "accuracy": None if math.isnan(accuracy[i]) else float(accuracy[i]),
                "pixels": int(self.labelled[i]),
                "predicted": int(self.predicted[i]),
                "intersection": int(self.intersection[i]),
            }
            for i in range(self.num_classes)
        ]

    def _ratios(self) -> tuple[np.ndarray, np.ndarray]:
        union = self.predicted + self.labelled - self.intersection
        with np.errstate(invalid="ignore"):
            return self.intersection / union, self.intersection / self.labelled


class ReferringMetrics:
    """Accumulates the overlap of masks, one per sentence, with what the sentences mean.

    truncated: how many of the sentences a text encoder has cut off; whoever calls it counts them.
    """

    def __init__(self) -> None:
        self.sentences = self.intersection = self.union = self.truncated = 0
        self.correct = [0] * len(PRECISION_AT)
        self._iou = ExactSum()

    def update(self, mask: np.ndarray, target: np.ndarray) -> dict[str, Any]:
        """Count one sentence: predicted and true mask (H,W), anything but 0 is inside. Returns its IoU and areas.

        Two empty masks have an IoU of 0, as in the reference.
        """
        _same_size(mask, target)
        mask, target = mask.astype(bool), target.astype(bool)
        intersection, union = int((mask & target).sum()), int((mask | target).sum())
        iou = intersection / union if union else 0.0
        self.sentences += 1
        self.intersection += intersection
        self.union += union
        self.correct = [count + (iou >= at) for count, at in zip(self.correct, PRECISION_AT, strict=True)]
        self._iou.add(iou)
        return {"IoU": iou, "intersection": intersection, "union": union}

    def merge(self, other: ReferringMetrics) -> None:
        """Add what another accumulator counted."""
        self.sentences += other.sentences
        self.intersection += other.intersection
        self.union += other.union
        self.truncated += other.truncated
        self.correct = [a + b for a, b in zip(self.correct, other.correct, strict=True)]
        self._iou.merge(other._iou)

    def compute(self) -> dict[str, float]:
        """Return oIoU (all intersections over all unions), mIoU (mean over sentences), P@X (share of IoUs from X on).

        NaN before the first sentence.
        """
        if not self.sentences:
            return dict.fromkeys(("oIoU", "mIoU", *(f"P@{at}" for at in PRECISION_AT)), math.nan)
        shares = {f"P@{at}": count / self.sentences for at, count in zip(PRECISION_AT, self.correct, strict=True)}
        overall = self.intersection / self.union if self.union else 0.0
        return {"oIoU": overall, "mIoU": self._iou.total() / self.sentences, **shares}


class DepthMetrics:
    """Accumulates errors in depth, each the mean over images of an image's value.

    min_depth, max_depth: metres; only pixels whose true depth lies strictly between them are measured.
    crop: "eigen" (rows 45 to 470, columns 41 to 600 of NYUv2's 480x640 images; images of other sizes are measured
    whole, and counted in `uncropped`), "garg" or "kitti_eigen" (fractions of the image), "none".
    """

    def __init__(self, min_depth: float = 1e-3, max_depth: float = 10.0, crop: str = "eigen") -> None:
        if not 0 < min_depth < max_depth:
            raise InputError(f"min_depth and max_depth must be metres with 0 < min < max, got {min_depth}, {max_depth}")
        if crop not in CROPS:
            raise InputError(f"crop must be one of {', '.join(CROPS)}, got {crop!r}")
        self.min_depth, self.max_depth, self.crop = float(min_depth), float(max_depth), crop
        self.images = self.uncropped = self.known = self.measured = 0
        self.farthest = 0.0
        self._sums = {name: ExactSum() for name in DEPTH_METRICS}

    def valid(self, target: np.ndarray) -> np.ndarray:
        """Return (H,W) bool, the pixels that are measured."""
        inside = np.zeros(target.shape, bool)
        rows, columns = self._window(target.shape)
        inside[rows, columns] = True
        return inside & (target > self.min_depth) & (target < self.max_depth)

    def update(self, depth: np.ndarray, target: np.ndarray) -> dict[str, Any] | None:
        """Measure one image: predicted and true depth (H,W), metres. Returns its metrics and number of pixels.

        A predicted infinity counts as max_depth; NaN, zero and less as min_depth. None, and only `count` is called, if
        no pixel is valid.
        """
        _same_size(depth, target)
        valid = self.valid(target)
        self.count(target)
        if not valid.any():
            return None
        found, wanted = depth[valid].astype(np.float64), target[valid].astype(np.float64)
        found[np.isinf(found)] = self.max_depth
        found[~(found > 0)] = self.min_depth
        row = _depth_errors(found, wanted)
        self.images += 1
        self.uncropped += self.crop == "eigen" and target.shape != NYU_SIZE
        for name, value in row.items():
            self._sums[name].add(value)
        return {**row, "pixels": int(wanted.size)}

    def count(self, target: np.ndarray) -> None:
        """Count the pixels with a depth (`known`), and those of them between min_depth and max_depth (`measured`)."""
        self.farthest = max(self.farthest, float(target.max()))
        self.known += int((target > 0).sum())
        self.measured += int(((target > self.min_depth) & (target < self.max_depth)).sum())

    def merge(self, other: DepthMetrics) -> None:
        """Add what another accumulator measured. Raises InputError if it measured other pixels."""
        mine, theirs = ((m.min_depth, m.max_depth, m.crop) for m in (self, other))
        if mine != theirs:
            raise InputError(f"cannot add depth metrics of (min, max, crop) {theirs} to ones of {mine}")
        self.farthest = max(self.farthest, other.farthest)
        for name in ("images", "uncropped", "known", "measured"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, terms in self._sums.items():
            terms.merge(other._sums[name])

    def compute(self) -> dict[str, float]:
        """Return the nine metrics; NaN before the first image."""
        if not self.images:
            return dict.fromkeys(DEPTH_METRICS, math.nan)
        return {name: terms.total() / self.images for name, terms in self._sums.items()}

    def _window(self, size: tuple[int, ...]) -> tuple[slice, slice]:
        if self.crop in _KITTI:
            top, bottom, left, right = _KITTI[self.crop]
            return (
                slice(int(top * size[0]), int(bottom * size[0])),
                slice(int(left * size[1]), int(right * size[1])),
            )
        if self.crop == "eigen" and size == NYU_SIZE:
            top, bottom, left, right = _NYU_EIGEN
            return slice(top, bottom), slice(left, right)
        return slice(None), slice(None)


def _depth_errors(found: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Return the metrics of one image from its valid pixels, in the order of DEPTH_METRICS."""
    ratio = np.maximum(wanted / found, found / wanted)
    difference, logs = found - wanted, np.log(found) - np.log(wanted)
    squares, mean_log = np.mean(logs**2), np.mean(logs)
    values = (
        *(np.mean(ratio < 1.25**power) for power in (1, 2, 3)),
        np.mean(np.abs(difference) / wanted),
        np.mean(difference**2 / wanted),
        np.sqrt(np.mean(difference**2)),
        np.sqrt(squares),
        np.mean(np.abs(logs)) / math.log(10),
        np.sqrt(max(squares - 0.5 * mean_log**2, 0.0)),
    )
    return dict(zip(DEPTH_METRICS, map(float, values), strict=True))


def _same_size(prediction: np.ndarray, target: np.ndarray) -> None:
    if prediction.shape != target.shape or prediction.ndim != 2:
        raise InputError(f"prediction {prediction.shape} and target {target.shape} must both be (H, W), of one size")


def _nanmean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else math.nan


def make_metrics(config: VPDConfig, **depth_options: Any) -> SegmentationMetrics | ReferringMetrics | DepthMetrics:
    """Make empty metrics for the task of a model; depth_options are those of DepthMetrics."""
    makers = {
        "segmentation": lambda: SegmentationMetrics(config.num_classes),
        "referring": ReferringMetrics,
        "depth": lambda: DepthMetrics(**depth_options),
    }
    return makers[config.task]()
