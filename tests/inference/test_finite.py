"""Output that is not finite is an error, whatever the task and the precision: argmax would make an answer of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vpd_fast import VPD, VPDConfig, optimize
from vpd_fast.cli.main import run
from vpd_fast.engine import Policy
from vpd_fast.errors import DatasetError, ImageError
from vpd_fast.evaluation import evaluate
from vpd_fast.inference import DepthResult, heatmap_grid, heatmap_overlay, predict, slide_inference
from vpd_fast.models.random_weights import randomize

from ..evaluation.sets import make_dataset
from ..helpers import miniature
from ..helpers.backbones import LEAST
from .stand_in import StandIn

MESSAGE = "values that are not finite"
PHOTO = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
TASKS = ("segmentation", "referring", "depth")
# One in each part of the network; what comes after it must not make a number of NaN.
PLACES = {
    "encoder": "encoder_vq.encoder.conv_out.bias",
    "UNet": "unet.unet.diffusion_model.middle_block.0.out_layers.3.bias",
    "last decoder block": "unet.unet.diffusion_model.output_blocks.7.0.out_layers.3.bias",
}

LAYERS = {  # the same in a fast model
    "encoder": "encoder.conv_out",
    "UNet": "unet.middle_block.0.conv2",
    "last decoder block": "unet.output_blocks.7.0.conv2",
}


def small(task: str, place: str | None = None, value: float = float("nan")) -> VPD:
    names = {"class_names": ("a", "b", "c", "d", "e")} if task == "segmentation" else {}
    config = VPDConfig(
        task=task, base_size=128, channels=32, num_classes=5, num_scenes=3, tokens=6, backbone=LEAST, **names
    )
    model = randomize(VPD.empty(config), 0).eval()
    if place is not None:
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            parameters[model.config.key_prefix + PLACES[place]][0] = value
    return model


def options(task: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"tokens": torch.randn(2, 6, 32, generator=generator)} if task == "referring" else {}


# Each precision at each place, and each pair with a task once or twice; the other cases are slow.
CASES = [
    pytest.param(task, precision, place, marks=() if (i + j + k) % 3 == 0 else pytest.mark.slow)
    for i, task in enumerate(TASKS)
    for j, precision in enumerate((None, "fp32", "bf16", "int8"))
    for k, place in enumerate(PLACES)
]
CASES += [pytest.param("segmentation", "fp8", "UNet", marks=pytest.mark.slow)]  # two minutes of emulated arithmetic


@pytest.mark.parametrize(("task", "precision", "place"), CASES)
def test_nan_of_a_layer_is_an_error(task: str, precision: str | None, place: str) -> None:
    if precision is None:
        model = small(task, place)
    else:  # as if arithmetic had made it: weights that are not finite are refused
        policy = Policy(emulate=True) if precision == "fp8" else None
        model = optimize(small(task), precision, policy=policy)
        model.layers.gemm(LAYERS[place]).bias[0] = float("nan")
    with pytest.raises(ImageError, match=MESSAGE):
        model.predict(PHOTO, **options(task))


LAST = {
    "segmentation": "decode_head.conv_seg.bias",
    "referring": "classifier.conv1_1.bias",
    "depth": "last_layer_depth.2.bias",
}


@pytest.mark.parametrize("task", TASKS)
def test_an_infinite_last_layer_is_an_error(task: str) -> None:
    """Also where a sigmoid would make the largest or the smallest depth of it."""
    model = small(task)
    bias = dict(model.named_parameters())[LAST[task]]
    assert np.isfinite(model.predict(PHOTO, **options(task)).values).all()
    for value in (float("inf"), float("-inf")):
        with torch.no_grad():
            bias[0] = value
        with pytest.raises(ImageError, match=MESSAGE):
            model.predict(PHOTO, **options(task))
    errors = model.predict([PHOTO, PHOTO], on_error="return", **options(task))
    assert [type(error) for error in errors] == [ImageError, ImageError]


class Broken(StandIn):
    """Logits, or only maps, with one value that is not finite in the last window."""

    def __init__(self, value: float, maps: bool) -> None:
        super().__init__()
        self.value, self.maps = value, maps

    def decode(self, features: list[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        logits = super().decode(features, size)
        if not self.maps:
            logits[-1, 2, -1, -1] = self.value
        return logits

    def split_maps(self, features: list[Tensor]) -> tuple[list[Tensor], dict[int, Tensor]]:
        features, maps = super().split_maps(features)
        if self.maps:
            maps[2][-1, 1, 0, 0] = self.value
        return features, maps


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_of_any_window_is_enough(value: float) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (150, 260, 3), dtype=np.uint8)
    for asked in ({}, {"flip": True, "scales": (1.0, 1.25)}, {"probabilities": True}, {"mode": "whole"}):
        with pytest.raises(ImageError, match=MESSAGE):
            predict(Broken(value, maps=False), photo, **asked)
    with pytest.raises(ImageError, match=MESSAGE):
        slide_inference(Broken(value, maps=False), torch.zeros(1, 3, 150, 260), 128, 85)
    with pytest.raises(ImageError, match=MESSAGE):
        predict(Broken(value, maps=True), photo, with_maps=True)
    assert predict(Broken(value, maps=True), photo).labels.shape == (150, 260)  # maps that nobody asked for


@pytest.mark.parametrize("task", TASKS)
def test_an_evaluation_measures_nothing_of_it(task: str) -> None:
    model, dataset = small(task, "UNet"), make_dataset(task, 2)
    encoder = {"text_encoder": lambda sentences: torch.ones(len(sentences), 6, 32)} if task == "referring" else {}
    with pytest.raises(DatasetError, match=f"none of the .* could be measured; the first: .*{MESSAGE}"):
        evaluate(model, dataset, **encoder)


def test_the_command_writes_nothing_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small("segmentation")
    with torch.no_grad():  # finite weights, whose sums are not
        model.decode_head.conv_seg.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "model")
    for name in ("a.png", "b.png"):
        miniature.write_image(tmp_path / "images" / name, PHOTO)
    command = [str(tmp_path / "images"), "--checkpoint", str(tmp_path / "model"), "-o", str(tmp_path / "out")]
    for name in ("predict", "maps"):
        assert run([name, *command]) == 1
        assert MESSAGE in capsys.readouterr().err
    records = json.loads((tmp_path / "out" / "results.json").read_text())["images"]
    assert [MESSAGE in record["error"] for record in records] == [True, True]
    assert not list((tmp_path / "out").glob("*.png"))


def test_pictures_of_it_are_not_drawn() -> None:
    heat = np.zeros((128, 128), np.float32)
    heat[5, 5] = np.nan
    for draw in (
        lambda: heatmap_overlay(PHOTO, heat),
        lambda: heatmap_grid(PHOTO, {"a": heat}, ["a"]),
        DepthResult(PHOTO, heat, 10.0).overlay,
    ):
        with pytest.raises(ImageError, match=MESSAGE):
            draw()
