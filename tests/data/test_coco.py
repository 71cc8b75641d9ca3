"""Polygons and run-length codes of COCO, good and broken."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as masks

from vpd_fast.data.coco import object_layers
from vpd_fast.errors import DatasetError

SQUARE, LINE = [10, 10, 40, 10, 40, 40, 10, 40], [50, 50, 60, 60]


@pytest.mark.parametrize(
    "segmentation", [[SQUARE], [SQUARE, LINE], [LINE, SQUARE], [[], SQUARE], [LINE, [1, 2], SQUARE]]
)
def test_the_order_of_polygons_does_not_matter(segmentation):
    layers = object_layers(segmentation, 100, 80, "a")
    assert (layers.shape, layers.sum(), layers.max()) == ((100, 80), 900, 1)


@pytest.mark.parametrize(
    "segmentation",
    [
        [], [LINE], [[1, 2]], [LINE, LINE], None, 5, "abc", ["abc"], [[1, 2, 3, 4, 5]], [[[1, 2], [3, 4], [5, 6]]],
        [SQUARE[:-1] + [float("nan")]], [SQUARE[:-1] + [float("inf")]], [SQUARE[:-1] + [1e9]], [[None] * 6],
        [{"a": 1}], {}, {"size": [100, 80]}, {"size": [100, 80], "counts": None},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_object(segmentation):
    with pytest.raises(DatasetError, match="val/1: no polygon and no RLE of 100x80 pixels") as raised:
        object_layers(segmentation, 100, 80, "val/1")
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("seed", range(4))
def test_codes_are_decoded_as_pycocotools_does(seed):
    rng = np.random.default_rng(seed)
    mask = np.asfortranarray(rng.random((37, 53)) < (0.5, 0.01, 0.99, 0)[seed], dtype=np.uint8)
    code = masks.encode(mask)
    for counts in (code["counts"], code["counts"].decode()):
        np.testing.assert_array_equal(object_layers({"size": [37, 53], "counts": counts}, 37, 53, "a"), mask)


@pytest.mark.parametrize(
    "code",
    [
        {"size": [37, 53], "counts": [5, 5]},  # the rest would be what was in memory
        {"size": [37, 53], "counts": [37 * 53, 5]},
        {"size": [37, 53], "counts": [37 * 53 + 5, -5]},
        {"size": [37, 53], "counts": [[37 * 53]]},
        {"size": [37, 53], "counts": []},
        {"size": [37, 53], "counts": ""},
        {"size": [37, 53], "counts": "55"},
        {"size": [37, 53], "counts": "!!zz99"},
        {"size": [37, 53], "counts": "é"},
        {"size": [37, 53], "counts": "P"},
        {"size": [53, 37], "counts": [37 * 53]},
        {"size": [10**9, 10**9], "counts": [10**18]},
        {"size": None, "counts": [37 * 53]},
    ],
    ids=str,
)
def test_codes_that_do_not_fill_the_image(code):
    with pytest.raises(DatasetError, match="val/1: no polygon and no RLE of 37x53"):
        object_layers(code, 37, 53, "val/1")
