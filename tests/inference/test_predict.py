"""One call for files, arrays and lists of them; a broken one does not stop the others if asked so."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vpd_fast import VPD, BackboneConfig, VPDConfig
from vpd_fast.errors import ImageError, InputError
from vpd_fast.inference import SegmentationResult, predict, predict_each
from vpd_fast.models.random_weights import randomize

from .stand_in import StandIn


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    paths[1].write_bytes(paths[1].read_bytes()[:100])
    return paths


def test_one_source_gives_one_result_and_a_list_a_list(photos: list[Path]) -> None:
    model = StandIn().eval()
    single = predict(model, photos[0])
    assert isinstance(single, SegmentationResult)
    array = np.array(Image.open(photos[0]))
    sources = [photos[0], str(photos[0]), array, Image.open(photos[0]), torch.from_numpy(array).permute(2, 0, 1)]
    results = predict(model, sources)
    assert len(results) == 5
    for result in results:
        np.testing.assert_array_equal(result.labels, single.labels)
    assert predict(model, []) == []


def test_a_broken_image_in_a_list_raises_and_is_named(photos: list[Path]) -> None:
    with pytest.raises(ImageError, match=r"1\.png: cannot read"):
        predict(StandIn(), photos)
    with pytest.raises(ImageError, match=r"source\[1\]: an array of shape \(5,\)"):
        predict(StandIn(), [np.zeros((4, 4), np.uint8), np.zeros(5, np.uint8)])


def test_a_broken_image_can_be_returned_as_its_error(photos: list[Path]) -> None:
    results = predict(StandIn(), [*photos, 42], on_error="return")
    assert [type(result) for result in results] == [SegmentationResult, ImageError, SegmentationResult, InputError]
    assert "1.png" in str(results[1])
    assert "source[3]" in str(results[3])


def test_predict_each_reads_one_image_at_a_time(photos: list[Path]) -> None:
    taken = []

    def sources() -> object:
        for path in (photos[0], photos[2], photos[1]):
            taken.append(path)
            yield path

    results = predict_each(StandIn(), sources())
    assert taken == []
    assert next(results).labels.shape == (20, 30)
    assert taken == [photos[0]]
    next(results)
    with pytest.raises(ImageError, match=r"1\.png"):
        next(results)


def test_wrong_options_are_found_before_the_first_image() -> None:
    with pytest.raises(InputError, match="mode must be"):
        predict_each(StandIn(), iter([]), mode="tile")
    with pytest.raises(InputError, match="mode must be"):
        predict(StandIn(), [], mode="tile")


def test_threads_share_a_model(photos: list[Path]) -> None:
    model = StandIn().eval()
    images = [np.random.default_rng(i).integers(0, 256, (40 + i, 60, 3), dtype=np.uint8) for i in range(6)]
    expected = [predict(model, image).labels for image in images]
    actual: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda i=i: actual.update({i: predict(model, images[i]).labels})) for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(6):
        np.testing.assert_array_equal(actual[i], expected[i])


def test_threads_predict_on_a_model_in_training_mode(tiny_backbone: BackboneConfig) -> None:
    config = VPDConfig(num_classes=3, channels=32, base_size=64, backbone=tiny_backbone)
    model = randomize(VPD(config)).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    expected = model.predict(image).labels
    results: list = [None] * 12

    def work(i: int) -> None:
        results[i] = model.predict(image).labels

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for labels in results:
        np.testing.assert_array_equal(labels, expected)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_a_float64_model_predicts_labels(tiny_backbone: BackboneConfig) -> None:
    config = VPDConfig(num_classes=3, channels=32, base_size=64, backbone=tiny_backbone)
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    single, double = (
        randomize(VPD(config)).to(dtype).predict(image).labels for dtype in (torch.float32, torch.float64)
    )
    assert (single == double).mean() >= 0.999
