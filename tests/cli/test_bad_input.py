"""Whatever is wrong with the input: one line "error: ...", exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from vpd_fast import VPD, VPDConfig
from vpd_fast.cli.main import run
from vpd_fast.models.random_weights import randomize


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def small(tmp_path, tiny_backbone):
    """`small(task)` -> options that build a small random model of that task."""

    def options(task: str, **changes) -> list[str]:
        path = tmp_path / f"{task}.json"
        config = VPDConfig(task=task, num_classes=5, num_scenes=3, channels=32, base_size=128, backbone=tiny_backbone)
        config.replace(**changes).save(path)
        return ["--random-weights", "1", "--config", str(path)]

    return options


@pytest.fixture
def fails(tmp_path, capsys, monkeypatch):
    """`fails(arguments)` -> the one line printed on stderr."""
    monkeypatch.chdir(tmp_path)  # where the default output folder would appear

    def check(arguments) -> str:
        assert run([str(argument) for argument in arguments]) == 2
        printed = capsys.readouterr()
        lines = printed.err.splitlines()
        assert len(lines) == 1, printed.err
        assert lines[0].startswith("error: ")
        assert not list(tmp_path.glob("vpd_results/*"))
        return lines[0]

    return check


def test_images(fails, small, photo, tmp_path):
    model = small("segmentation")
    assert "nowhere.jpg does not exist" in fails(["predict", photo, tmp_path / "nowhere.jpg", *model])
    (tmp_path / "folder").mkdir()
    assert "no images" in fails(["predict", tmp_path / "folder", *model])
    assert "no images (.jpg" in fails(["predict", tmp_path / "*.tiff", *model])
    (tmp_path / "text.jpg").write_text("not an image")
    assert "text.jpg: cannot read the image" in fails(["predict", tmp_path / "text.jpg", *model])
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:500])
    assert "cut.png: cannot read the image" in fails(["predict", tmp_path / "cut.png", *model])
    assert "Missing argument" in fails(["predict"])


def test_model_options(fails, small, photo, tmp_path):
    model = small("segmentation")
    assert "give either --checkpoint PATH or --random-weights SEED, got neither" in fails(["predict", photo])
    both = ["--checkpoint", "x.ckpt", "--random-weights", "1"]
    assert "got both" in fails(["predict", photo, *both])
    assert "--task must be one of segmentation, referring, depth, got 'boxes'" in fails(
        ["predict", photo, "--random-weights", "1", "--task", "boxes"]
    )
    assert "--task is depth, but" in fails(["predict", photo, *model, "--task", "depth"])
    precisions = "--precision must be one of fp32, bf16, fp16, int8, fp8"
    assert precisions in fails(["predict", photo, *model, "--precision", "int4"])
    assert precisions in fails(["maps", photo, *model, "--precision", "int4"])
    assert 'precision "fp8" does not run on cpu' in fails(["maps", photo, *model, "--precision", "fp8"])
    both = ["--precision", "int8", "--attention-backend", "sdpa"]
    assert "leave --precision out" in fails(["predict", photo, *model, *both])
    assert "--device must be cpu, cuda or cuda:N, got 'tpu'" in fails(["predict", photo, *model, "--device", "tpu"])
    assert "usable GPUs" in fails(["predict", photo, *model, "--device", "cuda:99"])
    assert "--config goes with --random-weights" in fails(
        ["predict", photo, "--checkpoint", "x.ckpt", "--config", model[3]]
    )
    assert "Invalid value for '--random-weights'" in fails(["predict", photo, "--random-weights", "abc"])
    assert "No such option" in fails(["predict", photo, "--bogus"])
    assert "No such command" in fails(["detect", photo])


def test_attention_backends(fails, small, photo, monkeypatch):
    model = small("segmentation")
    assert "attention_backend must be one of 'plain', 'sdpa'" in fails(
        ["predict", photo, *model, "--attention-backend", "fast"]
    )
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert "needs `pip install 'vpd_fast[flash-attn]'`" in fails(
        ["maps", photo, *model, "--attention-backend", "flash-attn"]
    )
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    assert "attention backend 'flash-attn' needs a GPU, got tensors on cpu" in fails(
        ["predict", photo, *model, "--attention-backend", "flash-attn"]
    )


@pytest.mark.parametrize("content", ["{", "[]", '{"task": "boxes"}', '{"colour": 3}'])
def test_config_file(fails, photo, tmp_path, content):
    (tmp_path / "bad.json").write_text(content)
    fails(["predict", photo, "--random-weights", "1", "--config", tmp_path / "bad.json"])


def test_checkpoints(fails, photo, tmp_path, tiny_backbone):
    config = VPDConfig(task="depth", num_scenes=3, base_size=128, backbone=tiny_backbone)
    model = randomize(VPD.empty(config), 0)
    good = tmp_path / "depth.pth"
    torch.save({"model": model.state_dict()}, good)
    assert "missing.pth" in fails(["predict", photo, "--checkpoint", tmp_path / "missing.pth"])
    assert "depth.pth: holds a depth model; expected segmentation" in fails(
        ["predict", photo, "--checkpoint", good, "--task", "segmentation"]
    )
    cut = tmp_path / "cut.pth"
    cut.write_bytes(good.read_bytes()[:-1000])
    assert "cut.pth" in fails(["predict", photo, "--checkpoint", cut])
    assert "photo.png" in fails(["predict", photo, "--checkpoint", photo])
    other = tmp_path / "other.pth"
    torch.save({"model": {"weight": torch.zeros(3)}}, other)
    assert "other.pth" in fails(["predict", photo, "--checkpoint", other])


def test_options_of_other_tasks_and_unknown_names(fails, small, photo):
    segmentation, depth, referring = small("segmentation"), small("depth"), small("referring")
    assert "unknown scene 'garage'" in fails(["predict", photo, *depth, "--scene", "garage"])
    assert "scene number must be 0 to 2, got 7" in fails(["predict", photo, *depth, "--scene", "7"])
    assert "unknown class 'clss 1'; did you mean class 1" in fails(
        ["maps", photo, *segmentation, "--classes", "clss 1"]
    )
    assert "segmentation has no option scene" in fails(["predict", photo, *segmentation, "--scene", "0"])
    assert "depth has no option probabilities" in fails(["predict", photo, *depth, "--probabilities"])
    assert "referring segmentation needs --text" in fails(["predict", photo, *referring])
    assert "--text and --text-encoder are for referring models" in fails(
        ["predict", photo, *segmentation, "--text", "a dog"]
    )
    assert 'mode must be "slide" or "whole"' in fails(["predict", photo, *segmentation, "--mode", "fast"])
    assert "--scales must be numbers" in fails(["predict", photo, *segmentation, "--scales", "1,x"])
    assert "scales must be numbers in (0, 16]" in fails(["predict", photo, *segmentation, "--scales", "-1"])
    assert "--classes is for segmentation" in fails(["maps", photo, *referring, "--text", "dog", "--classes", "wall"])


def test_text_encoder(fails, small, photo, tmp_path):
    referring = [*small("referring"), "--text", "a dog", "--text-encoder"]
    assert "holds no readable CLIP" in fails(["predict", photo, *referring, tmp_path])


def test_models_without_maps(fails, small, photo):
    assert "depth models have no maps" in fails(["maps", photo, *small("depth")])
    plain = small("segmentation", use_attn=False)
    assert "this model has no cross-attention maps" in fails(["maps", photo, *plain])


def test_output(fails, small, photo, tmp_path, monkeypatch):
    from vpd_fast.cli.options import ModelOptions

    monkeypatch.setattr(ModelOptions, "load", lambda self: pytest.fail("the model was loaded first"))
    model = small("segmentation")
    (tmp_path / "file").write_text("not a folder")
    for output in (tmp_path / "file", tmp_path / "file" / "out"):
        line = fails(["predict", photo, *model, "-o", output])
        assert f"--output {output}: cannot write there" in line
    assert "photo.png there is one of the images" in fails(["predict", photo, *model, "-o", tmp_path])
    assert photo.read_bytes()[:4] == b"\x89PNG"


def test_convert(fails, tmp_path):
    assert "nowhere" in fails(["convert", tmp_path / "nowhere", tmp_path / "out", "--to", "vpd"])
    (tmp_path / "file.ckpt").write_text("text")
    assert "file.ckpt" in fails(["convert", tmp_path / "file.ckpt", tmp_path / "out", "--to", "vpd"])
    assert "to must be one of" in fails(["convert", tmp_path / "file.ckpt", tmp_path / "out", "--to", "tflite"])
    assert "--dtype must be one of" in fails(["convert", "a", "b", "--to", "vpd", "--dtype", "int8"])
    assert "Missing option" in fails(["convert", "a", "b"])
    assert not (tmp_path / "out").exists()


def test_too_little_memory_for_one_image(small, photo, tmp_path, monkeypatch, capsys):
    from vpd_fast.inference import SegmentationPredictor

    other = tmp_path / "large.png"
    Image.new("RGB", (200, 100)).save(other)
    start = SegmentationPredictor.start

    def greedy(self, group):
        if any(prepared.size == (100, 200) for prepared in group):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return start(self, group)

    monkeypatch.setattr(SegmentationPredictor, "start", greedy)
    assert run(["predict", str(other), str(photo), *small("segmentation"), "-o", str(tmp_path / "out")]) == 1
    assert "large.png: not enough memory" in capsys.readouterr().err
    records = json.loads((tmp_path / "out" / "results.json").read_text())["images"]
    assert ["error" in record for record in records] == [True, False]


def test_process_exit_code():
    command = [sys.executable, "-m", "vpd_fast.cli.main", "predict", "nowhere.jpg", "--random-weights", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: nowhere.jpg does not exist; expected image files, folders or globs\n"
