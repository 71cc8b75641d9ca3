"""A model or GPU that fails in the middle of a run: one line that says where, and everything until then is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vpd_fast import BackboneConfig, VPDConfig
from vpd_fast.cli.main import run
from vpd_fast.evaluation.tasks import Segmentation
from vpd_fast.inference.segmentation import SegmentationPredictor
from vpd_fast.training.tasks import TrainStep

from ..helpers import miniature, runs

ERROR = RuntimeError("CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA`\n" + "x" * 2000)


@pytest.fixture
def model(tmp_path: Path) -> list[str]:
    """Options that build a small random model."""
    backbone = BackboneConfig(model_channels=32, context_dim=64, num_heads=4, vae_ch=32)
    VPDConfig(num_classes=150, channels=32, base_size=64, backbone=backbone).save(tmp_path / "config.json")
    return ["--random-weights", "1", "--config", str(tmp_path / "config.json"), "--mode", "whole"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(np.full((64, 64, 3), 50 * i, np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[type, str, int], None]:
    """`failing(cls, method, n)`: the method raises when it is called for the n-th time."""

    def patch(cls: type, method: str, n: int) -> None:
        whole, calls = getattr(cls, method), iter(range(1, 1000))

        def call(*arguments: Any, **named: Any) -> Any:
            if next(calls) == n:
                raise ERROR
            return whole(*arguments, **named)

        monkeypatch.setattr(cls, method, call)

    return patch


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was written to stderr, apart from the display of loading."""
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    return [line for line in lines if line and "loading the model" not in line]


def test_predict_at_scale(model, images, failing, tmp_path, capsys) -> None:
    failing(SegmentationPredictor, "start", 3)
    command = ["predict", str(images), *model, "-o", str(tmp_path / "out"), "--resume"]
    assert run(command) == 2
    stopped, error = lines_of(capsys)
    assert stopped == "stopped: 2 images done, 0 failed; go on with --resume"
    assert error.startswith("error: 2.png: the model failed (RuntimeError: CUDA error: device-side assert triggered")
    assert len(error) < 400
    assert {"0.png", "1.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert run(command) == 0  # it goes on
    assert "2 images (2 done before)" in capsys.readouterr().out


def test_predict_with_one_file_of_results(model, images, failing, tmp_path, capsys) -> None:
    failing(SegmentationPredictor, "start", 3)
    assert run(["predict", str(images), *model, "-o", str(tmp_path / "out")]) == 2
    stopped, error = lines_of(capsys)
    assert stopped.startswith(f"stopped: 2 images done, 0 failed; they are in {tmp_path / 'out' / 'results.json'}")
    assert "2.png: the model failed" in error
    records = json.loads((tmp_path / "out" / "results.json").read_text())["images"]
    assert [Path(record["image"]).name for record in records] == ["0.png", "1.png"]


def test_a_single_image(model, images, failing, tmp_path, capsys) -> None:
    failing(SegmentationPredictor, "start", 1)
    assert run(["predict", str(images / "0.png"), *model, "-o", str(tmp_path / "out")]) == 2
    (error,) = lines_of(capsys)
    assert "0.png: the model failed" in error


@pytest.mark.parametrize("value", ["1", "0"])
def test_the_stack_is_there_for_who_wants_it(model, images, failing, tmp_path, capsys, monkeypatch, value) -> None:
    monkeypatch.setenv("VPD_FAST_TRACEBACK", value)
    failing(SegmentationPredictor, "start", 1)
    assert run(["predict", str(images), *model, "-o", str(tmp_path / "out")]) == 2
    found = capsys.readouterr().err
    assert ("Traceback" in found) == ("in launch\n" in found) == (value == "1")
    assert found.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("method", ["start", "measure"])
def test_evaluate(model, failing, tmp_path, capsys, method) -> None:
    root = miniature.ade20k(tmp_path / "ade", 3)
    failing(Segmentation, method, 2)
    command = ["evaluate", "--data", "ade20k", "--root", str(root), *model, "-o", str(tmp_path / "out")]
    assert run(command) == 2
    stopped, error = lines_of(capsys)
    assert stopped == "stopped: nothing is written, as the metrics are of all samples"
    assert ": the model failed (RuntimeError: CUDA error" in error
    assert list((tmp_path / "out").iterdir()) == []


def test_train(data, failing, tmp_path, capsys) -> None:
    runs.tiny("depth", data, schedule={"steps": 3}, checkpoints={"every_steps": 1}, data={"val_split": None}).save(
        tmp_path / "run.yaml"
    )
    command = ["train", str(tmp_path / "run.yaml"), "-o", str(tmp_path / "run"), "--resume", "auto"]
    failing(TrainStep, "forward", 3)
    assert run(command) == 2
    last = lines_of(capsys)[-1]
    assert last.startswith("error: step 3 failed (RuntimeError: CUDA error: device-side assert")
    assert last.endswith(f"; --resume auto goes on from {tmp_path / 'run' / 'checkpoints' / 'step_000002'}")
    assert run(command) == 0
