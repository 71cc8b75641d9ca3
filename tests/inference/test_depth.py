"""Depth against the reference's evaluation loop (shift window, flip), and on images of other shapes."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vpd_fast import VPD, BackboneConfig, VPDConfig
from vpd_fast.errors import InputError
from vpd_fast.inference import predict, scene_from_filename
from vpd_fast.inference.depth import shifted_axis
from vpd_fast.labels import NYU_SCENES
from vpd_fast.models.random_weights import randomize


class StandIn(nn.Module):
    """Depth in metres that depends on the pixel, its place in the window, and the scene."""

    def __init__(self, base_size: int = 128) -> None:
        super().__init__()
        self.config = VPDConfig(task="depth", base_size=base_size)
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.calls: list[tuple[tuple[int, ...], list[int] | None]] = []

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def forward(self, images: Tensor, class_ids: Tensor | None = None) -> dict[str, Tensor]:
        assert images.shape[2] % 32 == 0
        assert images.shape[3] % 32 == 0
        assert images.min() >= 0
        assert images.max() <= 1
        self.calls.append((tuple(images.shape), None if class_ids is None else class_ids.tolist()))
        depth = torch.einsum("c,nchw->nhw", self.weight, images)[:, None]
        depth = depth + torch.linspace(0, 1, images.shape[3])
        return {"pred_d": depth if class_ids is None else depth + class_ids.view(-1, 1, 1, 1)}


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def reference_evaluation(model: nn.Module, image: Tensor, class_ids: Tensor, shift_size: int) -> Tensor:
    """depth/test.py of the reference: windows as wide as high, shifted along the width, each with its mirror image."""
    height, width = image.shape[2:]
    interval = (width - height) // (shift_size - 1)
    total, count = torch.zeros(1, 1, height, width), torch.zeros(1, 1, height, width)
    for i in range(shift_size):
        window = image[..., i * interval : i * interval + height]
        depth = (model(window, class_ids)["pred_d"] + model(window.flip(3), class_ids)["pred_d"].flip(3)) / 2
        total[..., i * interval : i * interval + height] += depth
        count[..., i * interval : i * interval + height] += 1
    return total / count


def test_four_to_three_is_the_references_evaluation() -> None:
    model, image = StandIn(), photo(96, 128)
    result = predict(model, image, resize_to=96, scene=3, batch_size=4)
    tensor = torch.from_numpy(image / np.float32(255)).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = reference_evaluation(model, tensor, torch.tensor([3]), 2)
    assert result.depth.dtype == np.float32
    np.testing.assert_allclose(result.depth, expected[0, 0].numpy(), atol=1e-5)
    assert model.calls[0] == ((4, 3, 96, 96), [3] * 4)  # two windows and their mirror images


def test_released_geometry_does_not_resize_nyu_images() -> None:
    model = StandIn(base_size=512)
    predict(model, photo(480, 640), batch_size=2)
    assert [call[0] for call in model.calls] == [(2, 3, 480, 480)] * 2


def test_models_of_other_sizes_see_images_at_the_size_they_were_trained_at() -> None:
    model = StandIn(base_size=128)
    predict(model, photo(128, 128), batch_size=2)
    predict(model, photo(256, 256), batch_size=2)
    assert [call[0] for call in model.calls] == [(2, 3, 128, 128)] * 2


@pytest.mark.parametrize(
    ("length", "starts"),
    [(640, (0, 160)), (480, (0,)), (100, (0,)), (853, (0, 186, 373)), (1920, (0, 240, 480, 720, 960, 1200, 1440))],
)
def test_shifted_windows(length: int, starts: tuple[int, ...]) -> None:
    axis = shifted_axis(length, 480)
    assert axis.starts == starts
    assert axis.starts[-1] + axis.size == length
    assert all(b - a <= 240 for a, b in zip(starts, starts[1:], strict=False))


def test_portrait_images_are_shifted_along_their_height() -> None:
    model = StandIn()
    result = predict(model, photo(128, 96), resize_to=96, flip=False, batch_size=4)
    assert result.depth.shape == (128, 96)
    assert [call[0] for call in model.calls] == [(2, 3, 96, 96)]


def test_without_shift_window_the_image_is_one_forward() -> None:
    model, image = StandIn(), photo(96, 130)
    result = predict(model, image, resize_to=96, shift_window=False, flip=False)
    assert model.calls == [((1, 3, 96, 160), None)]
    padded = np.full((96, 160, 3), 0.5, np.float32)
    padded[:, :130] = image / np.float32(255)
    with torch.no_grad():
        expected = model(torch.from_numpy(padded).permute(2, 0, 1)[None])["pred_d"][0, 0, :, :130]
    np.testing.assert_allclose(result.depth, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (63, 65), (400, 301)])
def test_any_size_comes_back_at_its_size(size: tuple[int, int]) -> None:
    model = StandIn()
    result = predict(model, np.full((*size, 3), 51, np.uint8), flip=True)
    assert result.depth.shape == size
    # 0.2 * (1 + 2 + 3), and a ramp from 0 to 1 whose mean with its mirror image is 0.5 wherever nothing was padded.
    assert np.isfinite(result.depth).all()
    if min(size) * 4 >= max(size):
        np.testing.assert_allclose(result.depth.mean(), 1.7, atol=0.1)


def test_large_images_are_shrunk_without_aliasing() -> None:
    stripes = np.zeros((960, 1280, 3), np.uint8)
    stripes[:, ::2] = 255
    model = StandIn()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([1.0, 0.0, 0.0]))
    depth = predict(model, stripes, resize_to=96, shift_window=False, flip=False).depth
    ramp = cv2.resize(np.linspace(0, 1, 128, dtype=np.float32)[None], (1280, 960), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(depth, 0.5 + ramp, atol=0.005)


def test_scene_by_name_number_or_not_at_all() -> None:
    model, image = StandIn(), photo(96, 96)
    for scene, ids in (("kitchen", [6]), (6, [6]), ("Living Room", [2]), (None, None)):
        model.calls.clear()
        predict(model, image, scene=scene)
        assert model.calls[0][1] == ids
    with pytest.raises(InputError, match="unknown scene 'kitchenn'; did you mean kitchen"):
        predict(model, image, scene="kitchenn")
    with pytest.raises(InputError, match="scene number must be 0 to 26, got 27"):
        predict(model, image, scene=27)
    with pytest.raises(InputError, match="depth has no option with_maps"):
        predict(model, image, with_maps=True)


def test_scene_from_filename_takes_the_first_of_the_list() -> None:
    assert NYU_SCENES[scene_from_filename("study_room_0004_rgb_00001.jpg", NYU_SCENES)] == "study"
    assert NYU_SCENES[scene_from_filename("bathroom_rgb_00045.jpg", NYU_SCENES)] == "bathroom"
    assert scene_from_filename("garden.jpg", NYU_SCENES) is None


def test_small_model_end_to_end(tiny_backbone: BackboneConfig) -> None:
    config = VPDConfig(task="depth", num_scenes=27, base_size=128, backbone=tiny_backbone)
    model = randomize(VPD(config)).eval()
    image = photo(96, 128)
    result = model.predict(image, resize_to=96, scene="bedroom")
    tensor = torch.from_numpy(image / np.float32(255)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        expected = reference_evaluation(model, tensor, torch.tensor([8]), 2)
    np.testing.assert_allclose(result.depth, expected[0, 0].numpy(), rtol=1e-4)
    assert result.max_depth == 10.0
    assert 0 < result.depth.min() <= result.depth.max() < 10
    mean = model.predict(image)
    assert not np.allclose(mean.depth, result.depth, rtol=1e-6)
