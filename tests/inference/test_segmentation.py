"""Segmentation of any size against straightforward implementations, on a stand-in model; then on a real small one."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vpd_fast import VPD, BackboneConfig, VPDConfig
from vpd_fast.errors import InputError
from vpd_fast.inference import make_predictor, predict, slide_inference
from vpd_fast.models.random_weights import randomize

from .stand_in import StandIn

SIZES = [(1, 1), (1, 700), (63, 65), (97, 311), (260, 131)]


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def literal_slide(
    model: torch.nn.Module, image: torch.Tensor, crop: int, stride: int, out: tuple[int, int]
) -> torch.Tensor:
    """The reference's loop: one window at a time, full-size logits; but small windows are padded to multiples of 64."""
    _, _, height, width = image.shape
    total = torch.zeros(1, model.config.num_classes, height, width)
    count = torch.zeros(1, 1, height, width)
    for row in range(max(height - crop + stride - 1, 0) // stride + 1):
        for column in range(max(width - crop + stride - 1, 0) // stride + 1):
            bottom, right = min(row * stride + crop, height), min(column * stride + crop, width)
            top, left = max(bottom - crop, 0), max(right - crop, 0)
            window = image[:, :, top:bottom, left:right]
            h, w = window.shape[2:]
            logits = model(F.pad(window, (0, -w % 64, 0, -h % 64)))[:, :, :h, :w]
            total[:, :, top:bottom, left:right] += logits
            count[:, :, top:bottom, left:right] += 1
    return F.interpolate(total / count, out, mode="bilinear", align_corners=False).softmax(1)


def resized(image: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """As mmcv does it: 8-bit bilinear resize, minus 127.5, over 127.5."""
    small = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy((small.astype(np.float32) - 127.5) / 127.5).permute(2, 0, 1)[None]


def fitted(height: int, width: int, short: int) -> tuple[int, int]:
    scale = min(4 * short / max(height, width), short / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def assert_labels(labels: np.ndarray, probabilities: torch.Tensor) -> None:
    first, second = probabilities[0].topk(2, 0).values
    decided = (first - second > 1e-5).numpy()
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels[decided], probabilities[0].argmax(0).numpy()[decided])


@pytest.mark.parametrize("size", [(128, 171), (64, 64), (65, 63), (1, 200), (300, 129)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_slide_inference_equals_the_literal_loop(size: tuple[int, int], batch_size: int) -> None:
    model = StandIn().eval()
    images = torch.rand(2, 3, *size) * 2 - 1
    actual = slide_inference(model, images, 128, 85, (50, 77), batch_size=batch_size)
    assert max(shape[0] for shape in model.sizes) <= batch_size
    with torch.no_grad():
        for i in range(2):
            expected = literal_slide(model, images[i : i + 1], 128, 85, (50, 77))
            torch.testing.assert_close(actual[i : i + 1], expected, rtol=0, atol=1e-5)
            flipped = slide_inference(model, images[i : i + 1].flip(2), 128, 85, (50, 77), flip="vertical")
            again = literal_slide(model, images[i : i + 1].flip(2), 128, 85, (50, 77)).flip(2)
            torch.testing.assert_close(flipped, again, rtol=0, atol=1e-5)


def test_slide_inference_names_bad_arguments() -> None:
    model, image = StandIn(), torch.zeros(1, 3, 64, 64)
    cases = [
        ({"image": torch.zeros(3, 64, 64)}, r"image must be .* got \(3, 64, 64\)"),
        ({"image": np.zeros((1, 3, 64, 64))}, "image must be .* got ndarray"),
        ({"image": torch.zeros(1, 3, 0, 64)}, r"\(1, 3, 0, 64\)"),
        ({"crop_size": 0}, "crop_size must be"),
        ({"stride": (1, 2, 3)}, "stride must be"),
        ({"stride": 129}, "stride .* must not exceed crop_size"),
        ({"out_size": (0, 3)}, "out_size must be"),
        ({"flip": "both"}, 'flip must be None, "horizontal" or "vertical", got \'both\''),
        ({"batch_size": 0}, "batch_size must be"),
    ]
    for changes, message in cases:
        with pytest.raises(InputError, match=message):
            slide_inference(model, **{"image": image, "crop_size": 128, "stride": 85, **changes})


@pytest.mark.parametrize("size", SIZES)
def test_predict_is_the_references_test_pipeline(size: tuple[int, int]) -> None:
    model, image = StandIn().eval(), photo(*size)
    result = predict(model, image, probabilities=True, batch_size=2)
    with torch.no_grad():
        expected = literal_slide(model, resized(image, fitted(*size, 128)), 128, 85, size)
    assert result.labels.shape == size
    np.testing.assert_allclose(result.probabilities, expected[0].numpy(), atol=1e-5)
    assert_labels(result.labels, expected)
    assert_labels(predict(model, image).labels, expected)  # without probabilities another way is taken


@pytest.mark.parametrize("size", [(97, 311), (63, 65)])
def test_scales_and_flips_average_probabilities(size: tuple[int, int]) -> None:
    model, image = StandIn().eval(), photo(*size)
    scales = (1.0, 1.125, 1.5)
    result = predict(model, image, probabilities=True, scales=scales, flip=True)
    expected = torch.zeros(1, 5, *size)
    with torch.no_grad():
        for scale in scales:
            view = resized(image, _scaled_fit(size, scale))
            expected += literal_slide(model, view, 128, 85, size)
            expected += literal_slide(model, view.flip(3), 128, 85, size).flip(3)
    expected /= 6
    np.testing.assert_allclose(result.probabilities, expected[0].numpy(), atol=1e-5)
    assert_labels(result.labels, expected)


def _scaled_fit(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """mmseg multiplies the box (2048, 512) and rounds it down, then fits the image into it."""
    short, long = int(128 * scale), int(512 * scale)
    factor = min(long / max(size), short / min(size))
    return int(size[0] * factor + 0.5), int(size[1] * factor + 0.5)


def test_whole_mode_is_one_forward_on_multiples_of_64() -> None:
    model, image = StandIn().eval(), photo(97, 311)
    result = predict(model, image, mode="whole", probabilities=True)
    assert model.sizes == [(1, 3, 128, 384)]
    with torch.no_grad():
        logits = model(resized(image, (128, 384)))
    expected = F.interpolate(logits, (97, 311), mode="bilinear", align_corners=False).softmax(1)
    np.testing.assert_allclose(result.probabilities, expected[0].numpy(), atol=1e-5)


def test_resize_to_changes_the_short_side() -> None:
    model = StandIn().eval()
    predict(model, photo(50, 100), resize_to=192, batch_size=8)
    assert model.sizes == [(8, 3, 128, 128), (2, 3, 128, 128)]  # 192 x 384: 2 x 5 windows


def test_maps_are_merged_like_logits_and_made_when_asked_for() -> None:
    model, image = StandIn().eval(), photo(97, 311)
    result = predict(model, image, with_maps=True)
    names = [f"class {i}" for i in range(5)]
    assert list(result.maps) == names
    total = sum(result.maps[name] for name in names)
    assert result.maps["class 3"].dtype == np.float32
    np.testing.assert_array_equal(result.maps["class 3"], result.maps[3])
    np.testing.assert_allclose(total, np.ones((97, 311)), atol=1e-5)  # probabilities over classes, resized
    means = [result.maps[name].mean() for name in names]
    assert result.maps.strongest(1) == [names[int(np.argmax(means))]]
    assert predict(model, image).maps is None
    with pytest.raises(KeyError):
        result.maps["sky"]
    with pytest.raises(KeyError):
        result.maps[5]


def test_a_window_of_constant_attention_gives_a_constant_map() -> None:
    model = StandIn().eval()
    with torch.no_grad():
        model.mix.zero_()
    maps = predict(model, photo(97, 311), with_maps=True, flip=True, scales=(1.0, 1.5)).maps
    np.testing.assert_allclose(maps["class 0"], np.full((97, 311), 0.2), atol=1e-6)


def test_the_model_keeps_its_mode_and_predicts_in_eval_mode() -> None:
    model = StandIn().train()
    image = photo(64, 64)
    training = predict(model, image, probabilities=True)
    assert model.training
    assert model.dropout.training
    np.testing.assert_array_equal(
        training.probabilities, predict(model.eval(), image, probabilities=True).probabilities
    )
    assert not model.training


def test_a_large_image_needs_little_more_than_its_labels() -> None:
    """1 million pixels of 150 classes would be 600 MB of logits for each of the two views."""
    resource = pytest.importorskip("resource")
    model = StandIn(num_classes=150).eval()
    image = np.zeros((200, 5_000, 3), np.uint8)
    predict(model, image[:, :200], flip=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = predict(model, image, flip=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert result.labels.shape == (200, 5_000)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 3e8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "tile"}, 'mode must be "slide" or "whole", got \'tile\''),
        ({"scales": ()}, "scales must be"),
        ({"scales": (0,)}, "scales must be"),
        ({"resize_to": -1}, "resize_to must be"),
        ({"batch_size": True}, "batch_size must be"),
        ({"text": "a dog"}, "segmentation has no option text; its options are mode,"),
        ({"classes": ["a", "b"]}, "classes has 2 names, .* trained for 5 classes"),
        ({"classes": ["a", "b", "c", "d", "a"]}, "classes must not repeat a name"),
        ({"classes": "abcde"}, "classes must be a list of names"),
        ({"classes": ["a", "b", "c", "d", "e"]}, "classes needs text_encoder="),
        ({"on_error": "ignore"}, "on_error must be"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        predict(StandIn(), photo(8, 8), **options)


class Encoder:
    """Embeds a class by the length of its name."""

    def __init__(self, width: int) -> None:
        self.width, self.calls = width, 0

    def embed_classes(self, names: list[str]) -> torch.Tensor:
        self.calls += 1
        return torch.tensor([[float(len(name))] * self.width for name in names])


@pytest.fixture
def small_model(tiny_backbone: BackboneConfig) -> VPD:
    return randomize(VPD(VPDConfig(num_classes=6, channels=32, base_size=128, backbone=tiny_backbone))).eval()


def test_small_model_end_to_end(small_model: VPD, tmp_path: Path) -> None:
    image = photo(90, 130)
    result = small_model.predict(image, with_maps=True, probabilities=True)
    view = resized(image, fitted(90, 130, 128))
    expected = slide_inference(small_model, view, 128, 85, (90, 130))
    # Two float32 passes in other batches: their logits, of size 20, differ by 2e-6 relative, and no probability by more
    # than its logit does.
    np.testing.assert_allclose(result.probabilities, expected[0].numpy(), atol=4e-5)
    np.testing.assert_allclose(sum(result.maps.values()), np.ones((90, 130)), atol=1e-4)
    assert result.save(tmp_path / "labels.png") == [tmp_path / "labels.png"]


def test_own_class_names_change_the_embeddings_but_not_the_model(small_model: VPD) -> None:
    image, before = photo(64, 64), small_model.class_embeddings.clone()
    names, encoder = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff"], Encoder(64)
    predictor = make_predictor(small_model, classes=names, text_encoder=encoder, probabilities=True)
    result, again = predictor(image), predictor(image)
    assert encoder.calls == 1
    assert result.class_names == tuple(names)
    assert torch.equal(small_model.class_embeddings, before)
    np.testing.assert_array_equal(result.probabilities, again.probabilities)
    small_model.class_embeddings.copy_(encoder.embed_classes(names))
    expected = small_model.predict(image, probabilities=True)
    np.testing.assert_allclose(result.probabilities, expected.probabilities, atol=1e-5)
    with pytest.raises(InputError, match=r"class embeddings \(6, 63\), the model needs \(6, 64\)"):
        small_model.predict(image, classes=names, text_encoder=Encoder(63))


def test_maps_of_a_model_without_maps_are_an_error(tiny_backbone: BackboneConfig) -> None:
    config = VPDConfig(num_classes=3, channels=32, base_size=128, use_attn=False, backbone=tiny_backbone)
    with pytest.raises(InputError, match="with_maps=True needs a model with cross-attention maps"):
        randomize(VPD(config)).predict(photo(64, 64), with_maps=True)


def test_names_of_150_classes_are_ade20ks() -> None:
    assert predict(StandIn(150).eval(), photo(64, 64)).class_names[:3] == ("wall", "building", "sky")


def test_half_precision_models_give_float32_results() -> None:
    image = photo(97, 151)
    expected = predict(StandIn().eval(), image, probabilities=True)
    for dtype in (torch.bfloat16, torch.float16):
        result = predict(StandIn().eval().to(dtype), image, probabilities=True, with_maps=True)
        assert result.probabilities.dtype == np.float32
        assert result.maps["class 0"].dtype == np.float32
        np.testing.assert_allclose(result.probabilities, expected.probabilities, atol=0.05)
        assert (predict(StandIn().eval().to(dtype), image).labels == expected.labels).mean() > 0.97
