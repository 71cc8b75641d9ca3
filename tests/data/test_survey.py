"""Notes on targets as a whole: classes without a pixel, masks that are nearly all ignored, depths in another unit."""

from __future__ import annotations

import numpy as np
import pytest

from vpd_fast.data import open_dataset
from vpd_fast.data.survey import depth_notes, label_notes, survey

from ..helpers import miniature

NAMES = ("a", "b", "c", "d", "e", "f", "g")


@pytest.mark.parametrize(
    ("count", "labelled", "ignored", "expected"),
    [
        (2, [5, 5], 90, []),
        (2, [5, 0], 5, ["1 of 2 classes have no pixel in the masks: b", "50.0% of the pixels have the value 255"]),
        (2, [5, 0], 0, ["1 of 2 classes have no pixel in the masks: b"]),
        (2, [0, 5], 5, ["1 of 2 classes have no pixel in the masks: a"]),
        (3, [5, 0, 1], 5, ["1 of 3 classes have no pixel in the masks: b"]),
        (3, [1, 1, 1], 97, ["97.0% of the pixels are ignored (the value 255)"]),
        (
            3,
            [5, 0, 0],
            5,
            ["2 of 3 classes have no pixel in the masks: b, c", "50.0% of the pixels have the value 255"],
        ),
        (7, [1, 0, 0, 0, 0, 0, 0], 0, ["6 of 7 classes have no pixel in the masks: b, c, d, e, f, ..."]),
        (3, [0, 0, 0], 0, []),
    ],
)
def test_label_notes(count, labelled, ignored, expected):
    notes = label_notes(NAMES[:count], np.array(labelled), ignored)
    assert len(notes) == len(expected)
    for note, start in zip(notes, expected, strict=True):
        assert note.startswith(start)


def test_black_and_white_masks_have_a_hint():
    assert "binary" in label_notes(("ground", "thing"), np.array([9, 0]), 1)[1]


def test_depth_notes():
    assert depth_notes(0, 0, 0.0, 0, 10) == depth_notes(100, 50, 9.0, 0, 10) == []
    assert depth_notes(1000, 20, 900.0, 0, 10)[0].startswith("2.0% of the known depths are between 0 and 10 metres")
    assert depth_notes(1000, 1000, 0.255, 0, 10)[0].startswith("the largest depth is 0.255 metres, where up to 10")


def test_survey(tmp_path):
    miniature.folder(tmp_path / "own", "segmentation")
    data = open_dataset("folder", tmp_path / "own", "train", task="segmentation")
    assert survey(data, 10) == []
    for path in (tmp_path / "own/masks/train").iterdir():
        miniature.write_image(path, np.where(np.arange(96) % 2, 255, 0).astype(np.uint8) + np.zeros((64, 1), np.uint8))
    (tmp_path / "own/masks/train/train_0.png").write_bytes(b"broken")
    first, second, third = survey(data, 10)
    assert first.startswith("of 4 samples looked at: 1 cannot be read; the first: ")
    assert "train_0.png" in first
    assert second == "of 4 samples looked at: 4 of 5 classes have no pixel in the masks: red, green, blue, yellow"
    assert third.endswith("50.0% of the pixels have the value 255, which is ignored: are these black and white masks?")
    data = open_dataset("nyu", miniature.nyu(tmp_path / "nyu"), "train", depth_scale=2)
    assert "The option depth_scale says" in survey(data, 10)[0]
    assert survey(open_dataset("nyu", tmp_path / "nyu", "train"), 10) == []
    miniature.folder(tmp_path / "referred", "referring")
    for path in (tmp_path / "referred/masks").iterdir():
        miniature.write_image(path, np.zeros((64, 96), np.uint8))
    data = open_dataset("folder", tmp_path / "referred", "train", task="referring")
    assert survey(data, 10, limit=3) == ["of 3 samples looked at: 3 have a mask without an object"]
