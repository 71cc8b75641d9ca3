"""Agreement with the plain model, and the gate before a speed-up."""

from __future__ import annotations

import math

import pytest
import torch

from vpd_fast.bench.parity import GATES, Outputs, agreement, cosine, make_images, passes


def make_outputs(seed: int = 0, maps: int = 3) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(1, 8 + maps, side, side, generator=generator) for side in (8, 4)]
    logits = torch.randn(1, 5, 8, 8, generator=generator)
    return Outputs(torch.randn(1, 4, 8, 8, generator=generator), features, logits, logits.argmax(1))


def test_cosine() -> None:
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.6, abs=1e-12)
    assert math.isnan(cosine(torch.tensor([1.0, float("inf")]), torch.ones(2)))
    assert math.isnan(cosine(torch.zeros(2), torch.ones(2)))


def test_the_same_outputs_agree() -> None:
    found = agreement(make_outputs(), make_outputs())
    assert found["labels"] == 1
    assert len(found["features"]) == 2
    assert all(v == pytest.approx(1, abs=1e-12) for v in (found["latents"], found["logits"], *found["features"]))
    assert passes(found, "fp32")


def test_other_libraries_have_no_maps_no_head_and_maybe_one_feature() -> None:
    whole = make_outputs()
    found = agreement(Outputs(whole.latents, [whole.features[0][:, :8]]), whole)
    assert found["features"] == [pytest.approx(1, abs=1e-12)]
    assert set(found) == {"latents", "features"}


@pytest.mark.parametrize("precision", list(GATES))
@pytest.mark.parametrize("what", ["features", "logits"])
def test_gates(precision: str, what: str) -> None:
    found = {"latents": 0.0, "features": [1.0, 1.0], "logits": 1.0, "labels": 0.0}
    for value, expected in ((GATES[precision], True), (GATES[precision] - 1e-6, False), (math.nan, False)):
        found["features"][1], found["logits"] = (value, 1.0) if what == "features" else (1.0, value)
        assert passes(found, precision) is expected


def test_saved_outputs(tmp_path) -> None:
    outputs = make_outputs()
    outputs.save(tmp_path / "outputs.safetensors")
    loaded = Outputs.load(tmp_path / "outputs.safetensors")
    assert torch.equal(loaded.labels, outputs.labels)
    assert all(torch.equal(a, b) for a, b in zip(loaded.features, outputs.features, strict=True))
    half = Outputs(outputs.latents.bfloat16().mT, outputs.features[:1])
    half.save(tmp_path / "half.safetensors")
    loaded = Outputs.load(tmp_path / "half.safetensors")
    assert torch.equal(loaded.latents, half.latents.float())
    assert (len(loaded.features), loaded.logits, loaded.labels) == (1, None, None)


def test_images_are_images_and_always_the_same() -> None:
    images = make_images(2, 128)
    assert images.shape == (2, 3, 128, 128)
    assert images.abs().max() <= 1
    assert 0.2 < images.std() < 0.8
    assert torch.equal(images, make_images(2, 128))
