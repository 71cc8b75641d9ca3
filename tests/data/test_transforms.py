"""Transforms against arrays worked out by hand, and their random wrappers against what they may draw."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from vpd_fast.data import colors, make_transform, transforms
from vpd_fast.data.sample import Sample
from vpd_fast.errors import InputError

from ..helpers import miniature


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def pixel(*rgb: int) -> np.ndarray:
    return np.array([[rgb]], np.uint8)


def test_linear_cuts_off_and_clips():
    np.testing.assert_array_equal(colors.linear(pixel(10, 101, 250), 1.5, -3.2), pixel(11, 148, 255))
    np.testing.assert_array_equal(colors.linear(pixel(10, 31, 250), 1.0, -31.5), pixel(0, 0, 218))


def test_hue_and_saturation():
    np.testing.assert_array_equal(colors.hue(pixel(255, 0, 0), 60), pixel(0, 255, 0))  # 120 degrees on
    np.testing.assert_array_equal(colors.hue(pixel(0, 255, 0), -60), pixel(255, 0, 0))
    np.testing.assert_array_equal(colors.saturation(pixel(200, 100, 100), 0.0), pixel(200, 200, 200))
    # S = 255 * (200 - 120) / 200 = 102, x 1.5 = 153: the least channel is 200 * (1 - 153 / 255) = 80
    np.testing.assert_array_equal(colors.saturation(pixel(200, 120, 120), 1.5), pixel(200, 80, 80))


def test_gamma():
    np.testing.assert_array_equal(colors.gamma(pixel(0, 128, 255), 2.0), pixel(0, 64, 255))  # 128**2 / 255 = 64.25
    np.testing.assert_array_equal(colors.gamma(pixel(51, 128, 254), 0.5), pixel(114, 180, 254))


def test_shift_hsv():
    # H 0 -> 10 (20 degrees), S 255 - 55 = 200, V 255 - 55 = 200: channels 200, p + (200 - p) / 3, p = 200 * 55 / 255
    shifted = colors.shift_hsv(pixel(255, 0, 0), 10.9, -55.0, -55.0)
    np.testing.assert_array_equal(shifted, pixel(200, 95, 43))
    assert colors.shift_hsv(pixel(255, 0, 0), -10.0, 30.0, 0.0)[0, 0].tolist() == [255, 0, 85]  # H wraps to 170


def test_distortions_draw_every_branch_and_repeat():
    image = rng(1).integers(0, 256, (8, 8, 3), np.uint8)
    for distort in (colors.photometric_distortion, colors.jitter):
        results = [distort(image, rng(seed)) for seed in range(40)]
        assert any((result == image).all() for result in results)
        assert len({result.tobytes() for result in results}) > 20
        np.testing.assert_array_equal(results[3], distort(image, rng(3)))


def test_scale_fits_into_four_by_one():
    image, target = np.zeros((50, 100, 3), np.uint8), np.arange(5000, dtype=np.int32).reshape(50, 100)
    large, labels = transforms.scale(image, target, 1.28, 50)
    assert large.shape[:2] == labels.shape == (64, 128)
    assert labels[3, 5] == target[int(3 * 50 / 64), int(5 * 100 / 128)]  # OpenCV's nearest
    assert transforms.scale(np.zeros((10, 100, 3), np.uint8), target[:10], 1.0, 20)[1].shape == (8, 80)


def test_crop_avoids_one_class():
    target = np.zeros((20, 200), np.uint8)
    target[:, 190:] = 1
    found = [transforms.crop_corner(target, 20, 0.75, rng(seed)) for seed in range(200)]
    shares = [target[:, left : left + 20].mean() for _, left in found]
    good = sum(0.25 < share < 0.75 for share in shares)
    free = [transforms.crop_corner(target, 20, 1.0, rng(seed))[1] for seed in range(200)]
    # One draw in 181 has 6 to 10 columns of class 1: five do. Ten draws: 1 - (176 / 181)**10 = 24 %.
    assert 25 <= good <= 75
    assert 0 <= min(free) < 10
    assert 170 < max(free) <= 180
    ignored = np.full((20, 40), 255, np.uint8)
    ignored[:, :2], ignored[:, 2:4] = 0, 1
    assert transforms.crop_corner(ignored, 20, 0.75, rng())[0] == 0  # 255 is no class that could fill a crop


def test_cut_depth():
    image, depth = np.full((2, 8, 3), 7, np.uint8), np.full((2, 8), 2.566, np.float32)  # 2566 = 10 * 256 + 6
    result = transforms.cut(image, depth, 0.5, 0.99)  # columns 4 to 4 + int(4 * 0.99 * 0.75) = 6
    expected = image.copy()
    expected[:, 4:6] = 6
    np.testing.assert_array_equal(result, expected)
    assert transforms.cut(image, depth, 0.5, 0.0)[0, 4:6, 0].tolist() == [6, 7]  # never less than a column
    assert transforms.cut(image, depth, 0.0, 0.99, scaled=True)[0, 0, 0] == 65
    assert (image == 7).all()


def sample(scene: int | None = None, sentences: tuple[str, ...] = ()) -> Sample:
    image, labels, _ = miniature.picture(5)
    return Sample(image, labels, "x", sentences, scene)


def test_segmentation_example():
    transform = make_transform("segmentation", size=64)
    for seed in range(8):
        example = transform(sample(), rng(seed), 0)
        assert example["image"].shape == (3, 64, 64)
        assert example["image"].dtype == np.float32
        assert example["target"].dtype == np.int64
        assert set(np.unique(example["target"])) <= {0, 1, 2, 3, 4, 255}
        padding = example["target"] == 255
        assert (example["image"][:, padding] == 0).all()
        assert -1 <= example["image"].min() < example["image"].max() <= 1


def test_segmentation_without_chance_is_only_normalised():
    settings = {"ratio_range": (1.0, 1.0), "flip": 0.0, "photometric": False, "cat_max_ratio": 1.0}
    given = sample()
    example = make_transform("segmentation", size=96, **settings)(given, rng(), 0)  # 64 x 96 becomes 96 x 144
    image = cv2.resize(given.image, (144, 96), interpolation=cv2.INTER_LINEAR).transpose(2, 0, 1) / 127.5 - 1
    left = next(x for x in range(49) if np.allclose(image[:, :, x : x + 96], example["image"], atol=1e-6))
    labels = cv2.resize(given.target, (144, 96), interpolation=cv2.INTER_NEAREST)
    np.testing.assert_array_equal(example["target"], labels[:, left : left + 96])
    mirrored = make_transform("segmentation", size=96, **{**settings, "flip": 1.0})(given, rng(), 0)
    np.testing.assert_array_equal(mirrored["image"], example["image"][:, :, ::-1])
    np.testing.assert_array_equal(mirrored["target"], example["target"][:, ::-1])


def test_referring_example():
    transform = make_transform("referring", size=32)
    given = sample(sentences=("one", "two", "three"))
    examples = [transform(given, rng(seed), 0) for seed in range(30)]
    assert {example["sentence"] for example in examples} == {"one", "two", "three"}
    np.testing.assert_array_equal(examples[0]["image"], examples[1]["image"])
    # 64 x 96 to 32 x 32: Pillow's nearest takes the pixels at the centres, rows 1, 3, ..., columns 1, 4, ...
    np.testing.assert_array_equal(examples[0]["target"], given.target[1::2, 1::3])


def test_depth_example():
    depth = np.arange(64 * 96, dtype=np.float32).reshape(64, 96) / 1000
    given = Sample(miniature.picture(5)[0], depth, "x", (), 3)
    plain = {"flip": 0.0, "color": False, "cut_depth": "none"}
    example = make_transform("depth", size=48, **plain)(given, rng(2), 0)
    assert (example["class_id"], example["target"].dtype) == (3, np.float32)
    top, left = divmod(round(float(example["target"][0, 0]) * 1000), 96)
    np.testing.assert_array_equal(example["target"], depth[top : top + 48, left : left + 48])
    expected = given.image[top : top + 48, left : left + 48].transpose(2, 0, 1) / np.float32(255)
    np.testing.assert_array_equal(example["image"], expected)
    mirrored = make_transform("depth", size=48, **{**plain, "flip": 1.0})(given, rng(2), 0)
    assert (np.diff(mirrored["target"][0]) < 0).all()
    assert make_transform("depth", size=96, **plain)(given, rng(), 0)["target"].shape == (96, 96)
    assert make_transform("depth", size=48)(sample(), rng(), 1)["class_id"] == -1


@pytest.mark.parametrize(("rows", "size"), [(48, 49), (49, 98), (480, 490)])
def test_depth_is_enlarged_to_hold_the_crop(rows, size):
    """480 * (490 / 480) is less than 490 in floating point."""
    given = Sample(np.zeros((rows, rows + 7, 3), np.uint8), np.ones((rows, rows + 7), np.float32), "x")
    assert make_transform("depth", size=size)(given, rng(), 1)["target"].shape == (size, size)


def test_every_fourth_image_of_depth_is_cut():
    given = Sample(np.zeros((64, 96, 3), np.uint8), np.full((64, 96), 0.2, np.float32), "x")
    transform = make_transform("depth", size=64, flip=0.0, color=False)
    cut = [
        any((transform(given, rng(seed), position)["image"] > 0).any() for seed in range(9)) for position in range(9)
    ]
    assert cut == [True, False, False, False, True, False, False, False, True]


@pytest.mark.parametrize("task", ["segmentation", "referring", "depth"])
def test_without_training_nothing_is_random(task):
    transform = make_transform(task, train=False, size=32)
    given = sample(1, ("one", "two"))
    if task == "depth":
        given = Sample(given.image, given.target.astype(np.float32), "x", (), 1)
    first, second = (transform(given, rng(seed), seed) for seed in (0, 4))
    for key, value in first.items():
        np.testing.assert_array_equal(value, second[key])
    assert first["image"].shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "pose", "size": 3}, "'pose'"),
        ({"task": "depth", "size": 0}, "size must be a positive"),
        ({"task": "depth", "size": 3, "speed": 1}, "depth has flip, color, cut_depth, got speed"),
        ({"task": "referring", "size": 3, "flip": 1}, "referring has none, got flip"),
        ({"task": "depth", "size": 3, "cut_depth": "all"}, "reference, scaled, none, got 'all'"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(InputError, match=message):
        make_transform(arguments.pop("task"), **arguments)
