"""Fast models on the command line: --precision, and folders of saved engines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vpd_fast import VPD, VPDConfig
from vpd_fast.cli.main import run
from vpd_fast.models.random_weights import randomize

from ..helpers.backbones import TINY


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with a small segmentation model, to be read only."""
    config = VPDConfig(num_classes=5, channels=32, base_size=128, backbone=TINY)
    folder = tmp_path_factory.mktemp("saved") / "model"
    randomize(VPD.empty(config), 1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(saved) -> Path:
    """The same as a fast model in int8."""
    folder = saved.with_name("engine")
    assert run(["convert", str(saved), str(folder), "--to", "engine"]) == 0
    return folder


@pytest.fixture
def photo(tmp_path) -> str:
    pixels = np.random.default_rng(0).integers(0, 255, (7, 10, 3), np.uint8)
    Image.fromarray(pixels).resize((100, 70), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def labels_and_results(folder: Path) -> tuple[np.ndarray, dict]:
    return np.asarray(Image.open(folder / "photo.png")), json.loads((folder / "results.json").read_text())


def test_predict_in_each_precision(saved, photo, tmp_path):
    assert run(["predict", photo, "--checkpoint", str(saved), "-o", str(tmp_path / "plain")]) == 0
    plain, results = labels_and_results(tmp_path / "plain")
    assert (results["precision"], results["fast"]) == ("fp32", False)
    for precision, least in (("fp32", 0.999), ("bf16", 0.95), ("int8", 0.8)):  # neighbouring classes of random weights
        output = tmp_path / precision
        assert run(["predict", photo, "--checkpoint", str(saved), "--precision", precision, "-o", str(output)]) == 0
        labels, results = labels_and_results(output)
        assert (results["precision"], results["fast"]) == (precision, True)
        assert (labels == plain).mean() >= least


def test_convert_to_an_engine_and_predict_with_it(saved, photo, tmp_path, capsys):
    engine, direct, output = tmp_path / "engine", tmp_path / "direct", tmp_path / "out"
    assert run(["convert", str(saved), str(engine), "--to", "engine", "--precision", "int8"]) == 0
    assert "Winograd F(2x2)" in capsys.readouterr().out
    assert run(["predict", photo, "--checkpoint", str(engine), "-o", str(output)]) == 0
    assert run(["predict", photo, "--checkpoint", str(saved), "--precision", "int8", "-o", str(direct)]) == 0
    np.testing.assert_array_equal(labels_and_results(output)[0], labels_and_results(direct)[0])
    assert labels_and_results(output)[1]["precision"] == "int8"
    assert run(["maps", photo, "--checkpoint", str(engine), "-o", str(tmp_path / "maps")]) == 0


def test_an_engine_for_gpus_is_made_without_one(saved, photo, tmp_path, capsys):
    engine, output = tmp_path / "engine", tmp_path / "out"
    arguments = ["convert", str(saved), str(engine), "--to", "engine", "--device", "cuda"]
    assert run([*arguments, "--precision", "int8"]) == 0
    assert "Winograd F" not in capsys.readouterr().out
    assert run(["predict", photo, "--checkpoint", str(engine), "-o", str(output)]) == 0
    assert labels_and_results(output)[1]["precision"] == "int8"
    assert run([*arguments, "--precision", "fp8"]) == 0
    capsys.readouterr()
    assert run(["predict", photo, "--checkpoint", str(engine), "-o", str(output)]) == 2
    assert "which CPUs have no kernels for" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "engine", "--dtype", "fp16"], "--dtype is for checkpoints"),
        (["--to", "vpd", "--precision", "int8"], "--precision is for --to engine"),
        (["--to", "engine", "--precision", "int4"], "fp32, bf16, fp16, int8, fp8"),
        (["--to", "fastengine"], "aoti, onnx, got 'fastengine'"),
        (["--to", "vpd", "--device", "cuda"], "--device is for --to engine"),
        (["--to", "engine", "--device", "tpu"], "cpu, cuda, got 'tpu'"),
    ],
)
def test_options_of_convert_that_contradict(saved, tmp_path, capsys, options, message):
    assert run(["convert", str(saved), str(tmp_path / "out"), *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_an_engine_never_replaces_a_file(saved, tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("something")
    assert run(["convert", str(saved), str(path), "--to", "engine"]) == 2
    assert "an engine is a folder" in " ".join(capsys.readouterr().err.split())
    assert path.read_text() == "something"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "bf16"], "is a fast model in int8"),
        (["--task", "depth"], "is a segmentation model"),
        (["--attention-backend", "sdpa"], "--attention-backend is for plain models"),
        (["--device", "cuda"], "PyTorch sees 0 usable GPUs"),
    ],
)
def test_options_that_do_not_fit_an_engine(engine, photo, capsys, options, message):
    capsys.readouterr()
    assert run(["predict", photo, "--checkpoint", str(engine), *options]) != 0
    assert message in " ".join(capsys.readouterr().err.split())
