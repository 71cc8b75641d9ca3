"""Exported models compute what the plain ones do, for any batch, in programs without this package."""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.backbones import LEAST
from vpd_fast import VPD, BackboneConfig, VPDConfig, optimize
from vpd_fast.cli.main import run
from vpd_fast.errors import InputError, MissingDependencyError
from vpd_fast.interop.export import export, save_export
from vpd_fast.models.random_weights import randomize
from vpd_fast.tasks import TASKS

MAX_ERROR = 1e-4  # relative, at fp32


# Transformers at the lowest level only: two thirds of the operations, which exporting takes its time for.
FEWEST = dataclasses.replace(LEAST, attention_resolutions=(8,))


def small(task: str, backbone: BackboneConfig = LEAST) -> VPD:
    config = VPDConfig(task=task, num_classes=2, num_scenes=2, channels=8, base_size=128, backbone=backbone)
    return randomize(VPD.empty(config), 1).eval()


def inputs_of(model: VPD, batch: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(batch)
    images = torch.rand(batch, 3, 128, 128, generator=generator)
    if not TASKS[model.task].takes_text:
        return (images,)
    return images, torch.randn(batch, model.config.tokens, LEAST.context_dim, generator=generator)


def expected_of(model: VPD, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    with torch.no_grad():
        found = model(*inputs)
    return found["pred_d"] if isinstance(found, dict) else found


def require_close(found, expected) -> None:
    assert found.shape == expected.shape
    assert float(np.abs(np.asarray(found) - expected.numpy()).max()) <= MAX_ERROR * float(expected.abs().max())


def onnx_results(path: Path, inputs: tuple[torch.Tensor, ...]) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    assert [output.name for output in session.get_outputs()] == ["result"]
    names = [i.name for i in session.get_inputs()]
    return session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})[0]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_exports_of_all_tasks(task, tmp_path):
    model = small(task)
    loaded = torch.export.load(save_export(model, tmp_path / "model.pt2")).module()
    onnx = save_export(model, tmp_path / "model.onnx", to="onnx")
    for batch in (1, 3):
        inputs = inputs_of(model, batch)
        require_close(loaded(*inputs).detach(), expected_of(model, inputs))
        require_close(onnx_results(onnx, inputs), expected_of(model, inputs))


@pytest.mark.slow
def test_aoti_needs_no_code_of_ours(tmp_path):
    model = small("segmentation")
    path, inputs = save_export(model, tmp_path / "model.pt2", to="aoti"), inputs_of(model, 3)
    assert list(tmp_path.iterdir()) == [path]
    torch.save(inputs, tmp_path / "inputs.pt")
    code = (
        "import sys, torch; sys.modules['vpd_fast'] = None; from torch._inductor import aoti_load_package\n"
        "model = aoti_load_package(sys.argv[1]); torch.save(model(*torch.load(sys.argv[2])), sys.argv[3])"
    )
    arguments = [str(path), str(tmp_path / "inputs.pt"), str(tmp_path / "result.pt")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    require_close(torch.load(tmp_path / "result.pt"), expected_of(model, inputs))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_example_of_the_documentation(compiled: bool, tmp_path, monkeypatch):
    """The page's lines run; those that compile, which takes a minute, only with the slow tests."""
    page = Path(__file__).parents[2] / "docs" / "export.md"
    lines = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[0].splitlines()
    kept = [line for line in lines if compiled or 'to="aoti"' not in line]
    assert len(kept) == len(lines) - (not compiled)
    model = small("depth", FEWEST)
    monkeypatch.setattr(VPD, "from_pretrained", lambda name: model)
    monkeypatch.setattr(
        "vpd_fast.interop.export.export", functools.cache(export)
    )  # all formats are made of one program
    monkeypatch.chdir(tmp_path)
    exec("\n".join(kept), {})
    inputs = inputs_of(model, 2)
    loaded = torch.export.load("depth.pt2").module()
    require_close(loaded(*inputs).detach(), expected_of(model, inputs))
    require_close(onnx_results(Path("depth.onnx"), inputs), expected_of(model, inputs))
    assert Path("depth_cpu.pt2").exists() is compiled


@pytest.mark.slow
def test_onnx_by_the_command_line(tmp_path):
    model = small("segmentation")
    model.save_pretrained(tmp_path / "model")
    assert run(["convert", str(tmp_path / "model"), str(tmp_path / "out.onnx"), "--to", "onnx"]) == 0
    for batch in (1, 3):
        inputs = inputs_of(model, batch)
        require_close(onnx_results(tmp_path / "out.onnx", inputs), expected_of(model, inputs))


def test_what_cannot_be_exported(tmp_path, monkeypatch):
    model = small("segmentation")
    with pytest.raises(InputError, match="expected a plain model, got FastSegmentation"):
        export(optimize(model, "int8"))
    for size, message in ((100, "multiples of 64"), (0, "positive integer"), ("128", "positive integer")):
        with pytest.raises(InputError, match=message):
            export(model, size)
    with pytest.raises(InputError, match="to must be one of export, aoti, onnx"):
        save_export(model, tmp_path / "model.pt2", to="tflite")
    with pytest.raises(InputError, match=re.escape("ends in .onnx")):
        save_export(model, tmp_path / "model.pt2", to="onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingDependencyError, match=re.escape("vpd_fast[onnx]")):
        save_export(model, tmp_path / "model.onnx", to="onnx")
    model.attention_backend = "sdpa"
    with pytest.raises(InputError, match="set it to 'plain'"):
        export(model)
    with pytest.raises(InputError, match="call eval"):
        export(model.train())
    assert not list(tmp_path.iterdir())


def test_options_of_the_command_line(tmp_path, capsys):
    assert run(["convert", "shapes-depth", str(tmp_path / "out"), "--to", "vpd", "--size", "128"]) == 2
    assert "--size is for --to export, aoti, onnx, not --to vpd" in capsys.readouterr().err
    assert run(["convert", "shapes-depth", str(tmp_path / "out.pt"), "--to", "export"]) == 2
    assert "ends in .pt2" in capsys.readouterr().err
    assert run(["convert", "shapes-depth", str(tmp_path / "out.pt2"), "--to", "export", "--precision", "int8"]) == 2
    assert "--precision is for --to engine, not --to export" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
