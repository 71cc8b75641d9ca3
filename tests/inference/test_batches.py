"""Images that share forwards: each gets what it gets alone, in order, and none spoils the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vpd_fast import VPD, VPDConfig, optimize
from vpd_fast.errors import ImageError, InputError
from vpd_fast.inference import make_predictor, predict
from vpd_fast.inference.batching import BatchPredictor, OneByOne
from vpd_fast.inference.pipeline import Failure, outcomes
from vpd_fast.models.random_weights import randomize

from ..helpers.backbones import LEAST
from .stand_in import StandIn

SIZES = [(128, 128), (100, 150), (128, 128), (128, 128), (100, 150)]
RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
# Relative, float32 sums in another order: a layer adds up K <= 9 * 128 products, whose order moves the sum by about
# sqrt(K) * 2^-24 = 2e-6 of its scale; some 100 layers one after the other, independently, by sqrt(100) times that.
CLOSE = 2e-5
OPTIONS: dict[str, dict[str, Any]] = {
    "segmentation": {"flip": True, "with_maps": True},
    "segmentation, one view": {"mode": "whole"},
    "referring": {"tokens": torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0)), "with_maps": True},
    "depth": {"scene": 1},
}


@pytest.mark.parametrize(
    ("case", "precision"),
    [
        pytest.param(case, precision, marks=() if precision == common else pytest.mark.slow)
        for case, common in zip(OPTIONS, ["int8", None, "fp32", "int8"], strict=True)
        for precision in (None, "fp32", "int8")
    ],
)
def test_results_are_those_of_single_images(case: str, precision: str | None) -> None:
    """Bit for bit where our kernels compute, each image as if it were alone. PyTorch's products, those of the plain
    model and of the depth decoder in float32, may be others for a batch: they agree to CLOSE."""
    config = VPDConfig(
        task=case.split(",")[0], base_size=128, channels=32, num_classes=5, num_scenes=3, tokens=6, backbone=LEAST
    )
    model = randomize(VPD.empty(config), 0).eval()
    if precision is not None:
        model = optimize(model, precision)
    alone = [predict(model, image, **OPTIONS[case]) for image in IMAGES]
    together = predict(model, IMAGES, batch_size=5, **OPTIONS[case])
    for image, one, found in zip(IMAGES, alone, together, strict=True):
        assert found.image is not None
        np.testing.assert_array_equal(found.image, image)
        assert found.values.dtype == one.values.dtype
        if case == "depth" and precision != "int8":
            np.testing.assert_allclose(found.values, one.values, rtol=CLOSE)
        elif precision is not None:
            np.testing.assert_array_equal(found.values, one.values)
        else:
            assert (found.values == one.values).mean() > 0.999
        if "with_maps" in OPTIONS[case]:
            pairs = zip(found.maps, one.maps, strict=True) if case == "referring" else [(found.maps, one.maps)]
            for maps, expected in pairs:
                np.testing.assert_allclose(maps[0], expected[0], rtol=CLOSE)


class Sizes(StandIn):
    """Notes the sizes of its batches; fails beyond `limit` images, and makes NaN of black ones."""

    def __init__(self, limit: int = 100) -> None:
        super().__init__()
        self.limit = limit

    def decode(self, features: list[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        if len(features[0]) > self.limit:
            raise torch.OutOfMemoryError("too many")
        logits = super().decode(features, size)
        black = (features[0][:, :3] == -1).flatten(1).all(1)
        return torch.where(black[:, None, None, None], torch.nan, logits)

    def batches(self) -> list[int]:
        return [size[0] for size in self.sizes]


def test_batches_are_full_and_of_one_size() -> None:
    model, size = Sizes(), (128, 128, 3)
    images = [RNG.integers(0, 256, (64, 200, 3) if i in (1, 2) else size, dtype=np.uint8) for i in range(9)]
    results = predict(model, images, batch_size=3, mode="whole")
    assert model.batches() == [3, 3, 2, 1]  # 0 3 4, 5 6 7, then 1 2, which waited for a third, and 8
    for image, result in zip(images, results, strict=True):
        np.testing.assert_array_equal(result.image, image)
        np.testing.assert_array_equal(result.labels, predict(model, image, mode="whole").labels)
    model.sizes.clear()
    predict(model, images[3:6], batch_size=3, mode="whole", flip=True)
    assert model.batches() == [2, 2, 2]  # an image and its mirror image


def test_a_broken_image_spoils_only_itself() -> None:
    model = Sizes()
    images: list[Any] = [RNG.integers(0, 256, (128, 128, 3), dtype=np.uint8) for _ in range(6)]
    images[2], images[4] = np.zeros((128, 128, 3), np.uint8), np.zeros(5)
    found = predict(model, images, batch_size=6, mode="whole", on_error="return")
    assert model.batches() == [5]
    assert [type(result).__name__ for result in found] == [
        "SegmentationResult", "SegmentationResult", "ImageError", "SegmentationResult", "ImageError",
        "SegmentationResult",
    ]  # fmt: skip
    assert "not finite" in str(found[2])
    np.testing.assert_array_equal(found[3].labels, predict(model, images[3], mode="whole").labels)


def test_without_memory_batches_become_smaller() -> None:
    model = Sizes(limit=3)
    images = [RNG.integers(0, 256, (128, 128, 3), dtype=np.uint8) for _ in range(16)]
    predictor = make_predictor(model, batch_size=8, mode="whole")
    prepared = [predictor.prepare(image) for image in images]
    results = [outcome.result for outcome in outcomes(range(16), prepared.__getitem__, predictor, ahead=0, threads=0)]
    assert predictor.batch_size == 2
    assert model.batches() == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]  # it was learnt once
    for image, result in zip(images, results, strict=True):
        np.testing.assert_array_equal(result.labels, predict(model, image, mode="whole").labels)
    # The windows of one image, too; and where one window is too much, it is the image's error, and nothing is learnt.
    assert len(predict(model, np.zeros((128, 512, 3), np.uint8) + 9, batch_size=5).labels) == 128
    predictor = make_predictor(Sizes(limit=0), batch_size=4, mode="whole")
    with pytest.raises(ImageError, match="not enough memory for an image of this size"):
        predictor(images[0])
    assert predictor.batch_size == 4


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "many"])
def test_wrong_batch_sizes(value: object) -> None:
    with pytest.raises(InputError, match='batch_size must be a positive int, "auto" or None, got'):
        make_predictor(Sizes(), batch_size=value)


def test_auto_is_one_on_a_cpu() -> None:
    assert make_predictor(Sizes(), batch_size="auto").batch_size == 1


class Kinds(BatchPredictor[str]):
    """Items are texts; those of one first letter share a batch of three."""

    batch_size = 3

    def __init__(self) -> None:
        self.groups: list[str] = []

    def kind(self, prepared: str) -> str:
        return prepared[0]

    def forwards(self, prepared: str) -> int:
        return 1

    def start(self, group: Any) -> Any:
        self.groups.append(" ".join(group))
        if "x" in self.groups[-1]:
            raise RuntimeError("broken")
        results = [item.upper() for item in group]
        return lambda: results


def run(items: Any, predictor: BatchPredictor[Any], ahead: int = 0) -> list[Any]:
    return [outcome.result for outcome in outcomes(items, str, predictor, ahead=ahead, threads=max(ahead, 1))]


@pytest.mark.parametrize("ahead", [0, 1, 4])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_order_is_kept(ahead: int, on_gpu: bool) -> None:
    predictor = Kinds()
    predictor.on_gpu = on_gpu
    items = ["a1", "b1", "a2", "c1", "b2", "a3", "a4", "b3", "a5"]
    assert run(items, predictor, ahead) == [item.upper() for item in items]
    if ahead == 0:
        assert predictor.groups == ["a1 a2 a3", "b1 b2 b3", "c1", "a4 a5"]


def test_an_image_waits_for_four_batches_at_most() -> None:
    predictor = Kinds()
    taken: list[str] = []

    def items() -> Iterator[str]:
        for item in ["a0", *(f"b{i}" for i in range(30))]:
            taken.append(item)
            yield item

    found = outcomes(items(), str, predictor, ahead=0, threads=0)
    assert next(found).result == "A0"
    assert len(taken) == 13
    found.close()


def test_an_image_does_not_wait_for_images_that_do_not_come() -> None:
    more = threading.Event()

    def items() -> Iterator[str]:
        yield "a1"
        more.wait(20)
        yield "a2"

    found = outcomes(items(), str, Kinds(), ahead=2, threads=1)
    start = time.monotonic()
    assert next(found).result == "A1"
    assert time.monotonic() - start < 10
    more.set()
    assert [outcome.result for outcome in found] == ["A2"]


@pytest.mark.parametrize("ahead", [0, 3])
def test_what_was_predicted_comes_before_an_error(ahead: int) -> None:
    """Also what waited for an earlier image's company; of the model's errors and of those of listing."""
    found: list[str] = []
    given = ["c1", "a1", "a2", "a3", "x1", "x2", "x3", "a4"]
    with pytest.raises(Failure) as caught:
        found.extend(outcome.result for outcome in outcomes(given, str, Kinds(), ahead=ahead, threads=1))
    assert found == ["A1", "A2", "A3"]
    assert (caught.value.items, str(caught.value.cause)) == (["x1", "x2", "x3"], "broken")

    def items() -> Iterator[str]:
        yield from ("a1", "a2", "a3")
        raise InputError("no list")

    found.clear()
    with pytest.raises(InputError, match="no list"):
        found.extend(outcome.result for outcome in outcomes(items(), str, Kinds(), ahead=ahead, threads=1))
    assert found == ["A1", "A2", "A3"]


def test_a_gpu_gets_its_next_batch_before_it_ends_one() -> None:
    events: list[str] = []

    class Late(Kinds):
        on_gpu = True

        def start(self, group: Any) -> Any:
            name = group[0][0]
            events.append(f"begin {name}")
            return lambda: events.append(f"end {name}") or [item.upper() for item in group]

    assert run(["a1", "a2", "a3", "b1", "b2", "b3", "c1"], Late()) == ["A1", "A2", "A3", "B1", "B2", "B3", "C1"]
    assert events == ["begin a", "begin b", "end a", "end b", "begin c", "end c"] or events == [
        "begin a", "begin b", "end a", "begin c", "end b", "end c"
    ]  # fmt: skip


def test_functions_predict_one_by_one() -> None:
    predictor = OneByOne(lambda image: int(image[0, 0, 0]))
    assert predictor(np.full((2, 2, 3), 7, np.uint8)) == 7
