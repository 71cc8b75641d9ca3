"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest

from vpd_fast.errors import InputError
from vpd_fast.evaluation import DepthMetrics, ReferringMetrics, SegmentationMetrics
from vpd_fast.evaluation.metrics import DEPTH_METRICS, ExactSum


def test_segmentation_by_hand():
    target = np.array([[0, 0, 1, 1], [2, 2, 255, 1]], np.uint8)
    labels = np.array([[0, 1, 1, 1], [2, 0, 2, 0]])
    metrics = SegmentationMetrics(4)
    # Class 0: of 2 pixels 1 right, 3 predicted. Class 1: 2 of 3 right, 3 predicted. Class 2: 1 of 2, 1 predicted.
    row = metrics.update(labels, target)
    assert metrics.intersection.tolist() == [1, 2, 1, 0]
    assert metrics.predicted.tolist() == [3, 3, 1, 0]
    assert metrics.labelled.tolist() == [2, 3, 2, 0]
    iou = [1 / 4, 2 / 4, 1 / 2]  # class 3 occurs nowhere and has no part in the mean
    assert row == {"mIoU": pytest.approx(sum(iou) / 3), "aAcc": pytest.approx(4 / 7), "pixels": 7}
    assert metrics.compute() == {
        "mIoU": pytest.approx(sum(iou) / 3),
        "aAcc": pytest.approx(4 / 7),
        "mAcc": pytest.approx((1 / 2 + 2 / 3 + 1 / 2) / 3),
    }
    rows = metrics.per_class(["a", "b", "c", "d"])
    assert rows[0] == {
        "index": 0, "class": "a", "IoU": 0.25, "accuracy": 0.5, "pixels": 2, "predicted": 3, "intersection": 1,
    }  # fmt: skip
    assert (rows[3]["IoU"], rows[3]["accuracy"], rows[3]["pixels"]) == (None, None, 0)

    # A class that is predicted but has no label: an IoU of 0, no accuracy.
    metrics.update(np.array([[3]]), np.array([[0]]))
    assert metrics.compute()["mIoU"] == pytest.approx((1 / 5 + 1 / 2 + 1 / 2 + 0) / 4)
    assert metrics.compute()["mAcc"] == pytest.approx((1 / 3 + 2 / 3 + 1 / 2) / 3)
    assert metrics.per_class("abcd")[3]["accuracy"] is None


def test_segmentation_counts_add_up_over_images_not_their_ratios():
    metrics = SegmentationMetrics(2)
    metrics.update(np.zeros((1, 2), int), np.array([[0, 1]]))
    metrics.update(np.zeros((3, 3), int), np.zeros((3, 3), np.uint8))
    assert metrics.compute() == {"mIoU": pytest.approx((10 / 11) / 2), "aAcc": 10 / 11, "mAcc": 0.5}


def test_segmentation_without_labels_and_with_wrong_ones():
    metrics = SegmentationMetrics(3)
    assert metrics.update(np.zeros((2, 2), int), np.full((2, 2), 255, np.uint8)) is None
    assert metrics.images == 0
    assert math.isnan(metrics.compute()["mIoU"])
    with pytest.raises(InputError, match="labels from 0 to 3; expected 0 to 2, or 255"):
        metrics.update(np.zeros((1, 2), int), np.array([[0, 3]]))
    with pytest.raises(InputError, match=r"\(1, 2\) and target \(2, 1\)"):
        metrics.update(np.zeros((1, 2), int), np.zeros((2, 1), int))
    assert metrics.labelled.sum() == 0


def test_referring_by_hand():
    metrics = ReferringMetrics()
    square = np.zeros((4, 4), np.uint8)
    square[:2] = 1  # 8 pixels
    half = square.copy()
    half[0] = 0
    empty = np.zeros((4, 4), bool)
    assert metrics.update(half, square) == {"IoU": 0.5, "intersection": 4, "union": 8}
    assert metrics.update(square, square)["IoU"] == 1
    assert metrics.update(empty, empty) == {"IoU": 0.0, "intersection": 0, "union": 0}
    assert metrics.update(~empty, half) == {"IoU": 0.25, "intersection": 4, "union": 16}
    assert metrics.compute() == {
        "oIoU": 16 / 32, "mIoU": 1.75 / 4,
        "P@0.5": 0.5, "P@0.6": 0.25, "P@0.7": 0.25, "P@0.8": 0.25, "P@0.9": 0.25,
    }  # fmt: skip


def test_referring_with_nothing_in_any_mask():
    metrics = ReferringMetrics()
    assert math.isnan(metrics.compute()["oIoU"])
    metrics.update(np.zeros((2, 2)), np.zeros((2, 2)))
    assert metrics.compute()["oIoU"] == 0


def test_depth_by_hand():
    metrics = DepthMetrics(max_depth=10, crop="none")
    # One pixel twice as far, one right; unknown (0) and too far (12) ones count nowhere.
    row = metrics.update(np.array([[4.0, 5.0, 1.0, 1.0]]), np.array([[2.0, 5.0, 0.0, 12.0]], np.float32))
    log2 = math.log(2)
    expected = {
        "d1": 0.5, "d2": 0.5, "d3": 0.5, "abs_rel": 0.5, "sq_rel": 1.0, "rmse": math.sqrt(2),
        "rmse_log": log2 / math.sqrt(2), "log10": math.log10(2) / 2,
        "silog": math.sqrt(log2**2 / 2 - 0.5 * (log2 / 2) ** 2),
    }  # fmt: skip
    assert row == {**{name: pytest.approx(value) for name, value in expected.items()}, "pixels": 2}
    metrics.update(np.array([[1.3, 1.5, 1.9]]), np.ones((1, 3)))  # d1 below 1.25, d2 below 1.5625, d3 below 1.953
    found = metrics.compute()
    assert tuple(found) == DEPTH_METRICS
    assert [found[name] for name in ("d1", "d2", "d3")] == pytest.approx([0.25, (0.5 + 2 / 3) / 2, 0.75])
    second = math.sqrt((0.09 + 0.25 + 0.81) / 3)
    assert found["rmse"] == pytest.approx((math.sqrt(2) + second) / 2)  # the mean of images, not of pixels


def test_depth_that_is_no_number():
    metrics = DepthMetrics(max_depth=8, crop="none")
    row = metrics.update(np.array([[np.inf, np.nan, -1.0, 0.0]]), np.array([[4.0, 4.0, 4.0, 4.0]]))
    assert row["rmse"] == pytest.approx(math.sqrt((4**2 + 3 * (4 - 1e-3) ** 2) / 4))
    assert all(math.isfinite(value) for value in row.values())
    assert metrics.update(np.ones((2, 2)), np.array([[0, 8], [np.nan, np.inf]])) is None
    assert metrics.images == 1


def test_depth_crops():
    ones = np.ones((480, 640))
    assert DepthMetrics(crop="none").update(ones, ones)["pixels"] == 480 * 640
    eigen = DepthMetrics(crop="eigen")
    assert eigen.update(ones, ones)["pixels"] == (471 - 45) * (601 - 41)
    assert not eigen.valid(ones)[44].any()
    assert eigen.valid(ones)[45, 41]
    assert not eigen.valid(ones)[45, 40]
    assert eigen.valid(ones)[470, 600]
    assert eigen.uncropped == 0
    assert eigen.update(ones[:100, :100], ones[:100, :100])["pixels"] == 10000
    assert (eigen.images, eigen.uncropped) == (2, 1)
    kitti = np.ones((352, 1216))
    # 0.40810811 * 352 = 143.7, 0.99189189 * 352 = 349.1, 0.03594771 * 1216 = 43.7, 0.96405229 * 1216 = 1172.3
    assert DepthMetrics(crop="garg").update(kitti, kitti)["pixels"] == (349 - 143) * (1172 - 43)
    # 0.3324324 * 352 = 117.02, 0.91351351 * 352 = 321.6
    assert DepthMetrics(crop="kitti_eigen").update(kitti, kitti)["pixels"] == (321 - 117) * (1172 - 43)


@pytest.mark.parametrize("options", [{"crop": "nyu"}, {"min_depth": 0}, {"min_depth": 5, "max_depth": 5}])
def test_depth_options(options):
    with pytest.raises(InputError):
        DepthMetrics(**options)


def test_exact_sum_rounds_once_in_any_order():
    terms = [random.Random(3).uniform(-1, 1) * 10.0 ** random.Random(i).randint(-20, 20) for i in range(200)]
    exact = float(sum(map(Fraction, terms)))
    for seed in range(5):
        random.Random(seed).shuffle(terms)
        one, other = ExactSum(), ExactSum()
        for term in terms[:70]:
            one.add(term)
        for term in terms[70:]:
            other.add(term)
        one.merge(other)
        assert one.total() == exact
    assert ExactSum().total() == 0


def _update_all(metrics, seed):
    rng = np.random.default_rng(seed)
    for _ in range(20):
        if isinstance(metrics, SegmentationMetrics):
            metrics.update(rng.integers(0, 4, (9, 7)), rng.integers(0, 4, (9, 7)))
        elif isinstance(metrics, ReferringMetrics):
            metrics.update(rng.integers(0, 2, (9, 7)), rng.integers(0, 2, (9, 7)))
        else:
            metrics.update(rng.uniform(0.1, 9, (9, 7)), rng.uniform(0.1, 9, (9, 7)))
    return metrics


@pytest.mark.parametrize("make", [lambda: SegmentationMetrics(4), ReferringMetrics, DepthMetrics])
def test_parts_in_any_order_give_the_same_bits(make):
    whole = _update_all(_update_all(make(), 1), 2)
    first, second = _update_all(make(), 1), _update_all(make(), 2)
    second.merge(first)
    assert second.compute() == whole.compute()


def test_parts_that_do_not_fit():
    with pytest.raises(InputError, match="3 classes"):
        SegmentationMetrics(2).merge(SegmentationMetrics(3))
    with pytest.raises(InputError, match="eigen"):
        DepthMetrics(crop="none").merge(DepthMetrics(crop="eigen"))
