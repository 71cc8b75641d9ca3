"""The variants compute what the model computes, in this process and in one of their own."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch

from vpd_fast import VPD, VPDConfig
from vpd_fast.bench import catalog, peers
from vpd_fast.bench.parity import Outputs, agreement, passes
from vpd_fast.bench.variants import Case, Source, Variant, make_fast, make_loaded, make_plain
from vpd_fast.bench.worker import Worker, WorkerError
from vpd_fast.errors import InputError
from vpd_fast.models.random_weights import randomize

CASE = Case(64, batch=2)
# At 64x64 this network's lowest level has one position, and a group of one number has no variance: rounding explodes.
ROUNDED = Case(128)
# Rounding costs a small network more than a large one, and what others do about that is not ours to promise. Wrong
# weights give cosines far from 1.
LEAST = {"fp32": 0.9999, "bf16": 0.99, "int8": 0.9}


@pytest.fixture
def source(tiny_backbone, tmp_path):
    def make(task: str = "segmentation") -> Source:
        sizes = {"num_classes": 5, "num_scenes": 3, "tokens": 8, "channels": 32, "base_size": 128}
        model = randomize(VPD.empty(VPDConfig(task=task, backbone=tiny_backbone, **sizes)), 1)
        model.save_pretrained(tmp_path / task)
        return Source(tmp_path / task, tmp_path, torch.get_num_threads())

    return make


def run(variant: Variant, case: Case = CASE) -> tuple[dict[str, float], Outputs]:
    variant.prepare(case)
    return variant.run()


@pytest.mark.parametrize("task", ["segmentation", "referring", "depth"])
def test_stages_are_those_of_the_model(source, task: str) -> None:
    variant = make_plain(source(task))
    variant.prepare(CASE)
    variant._images = (variant._images * 128).round() / 128  # which [0, 1], where depth has them, holds exactly, too
    seconds, outputs = variant.run()
    assert list(seconds) == ["encoder", "unet", "head", *(["post"] if task != "depth" else [])]
    assert all(value > 0 for value in seconds.values())
    images, model = variant._images, variant.model
    with torch.inference_mode():
        if task == "segmentation":
            expected = model(images).argmax(1)
        elif task == "referring":
            expected = model(images, variant._conditioning[0]).argmax(1)
        else:
            expected = model(images / 2 + 0.5, variant._conditioning[0])["pred_d"]
    if task == "depth":
        assert outputs.labels is None
        assert torch.equal(outputs.logits, expected)
    else:
        assert torch.equal(outputs.labels, expected)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        *(("sdpa", "segmentation"), ("fast fp32", "segmentation"), ("fast fp32", "referring"), ("fast fp32", "depth")),
        *(pytest.param("sdpa", task, marks=pytest.mark.slow) for task in ("referring", "depth")),
    ],
)
def test_fast_variants_agree(source, task: str, name: str) -> None:
    weights = source(task)
    found = agreement(run(catalog.ENTRIES[name].make(weights))[1], run(make_plain(weights))[1])
    assert passes(found, "fp32"), found
    assert found.get("labels", 1.0) > 0.99


def test_a_saved_fast_model_is_the_same(source, tmp_path) -> None:
    weights = source()
    fast = make_fast(weights, "int8")
    fast.model.save(tmp_path / "engine")
    loaded = make_loaded(weights, tmp_path / "engine")
    assert torch.equal(run(loaded)[1].logits, run(fast)[1].logits)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        *(("diffusers-fp32", "segmentation"), ("diffusers-bf16", "depth")),
        pytest.param("diffusers-bf16", "segmentation", marks=pytest.mark.slow),
        pytest.param("diffusers-fp32", "depth", marks=pytest.mark.slow),
    ],
)
def test_diffusers_has_our_weights(source, name: str, task: str) -> None:
    pytest.importorskip("diffusers")
    weights, entry = source(task), catalog.ENTRIES[name]
    seconds, outputs = run(entry.make(weights), ROUNDED)
    assert list(seconds) == ["encoder", "unet"]
    found = agreement(outputs, run(make_plain(weights), ROUNDED)[1])
    assert min(found["latents"], *found["features"]) > LEAST[entry.precision]


@pytest.mark.slow
def test_compiled_diffusers(source) -> None:
    reason = peers.why_no_compile()
    if reason:
        pytest.skip(reason)
    weights = source()
    assert passes(
        agreement(run(catalog.ENTRIES["diffusers-compile"].make(weights))[1], run(make_plain(weights))[1]), "bf16"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openvino-fp32", "openvino-bf16", "openvino-int8"])
def test_openvino_has_our_weights(source, name: str) -> None:
    entry = catalog.ENTRIES[name]
    reason = entry.why_missing()
    if reason:
        pytest.skip(reason)
    weights = source()
    seconds, outputs = run(entry.make(weights), ROUNDED)
    assert list(seconds) == ["encoder", "unet"]
    found = agreement(outputs, run(make_plain(weights), ROUNDED)[1])
    assert min(found["latents"], *found["features"]) > LEAST[entry.precision]


def test_a_process_of_its_own(source, tmp_path) -> None:
    weights = source()
    worker = Worker(partial(make_fast, precision="int8"), weights, "fast int8")
    try:
        made = worker.wait()
        assert made["peak"] >= made["resident"] > 50 << 20  # PyTorch alone is more
        first = worker.prepare(CASE, tmp_path / "outputs.safetensors")
        assert first["peak"] >= first["resident"] > 50 << 20
        outputs = Outputs.load(tmp_path / "outputs.safetensors")
        assert torch.equal(outputs.logits, run(make_fast(weights, "int8"))[1].logits)
        assert list(worker.run()) == ["encoder", "unet", "head", "post"]
        worker.save(tmp_path / "engine")
        assert (tmp_path / "engine").is_dir()
        with pytest.raises(WorkerError, match="InputError: images must .*multiples of 64"):
            worker.prepare(Case(100), tmp_path / "outputs.safetensors")
        with pytest.raises(WorkerError, match="the process ended with exit code 0"):
            worker.run()
    finally:
        worker.close()


@pytest.mark.usefixtures("quick_workers")
def test_a_process_that_cannot_start_or_is_killed(source, tmp_path) -> None:
    weights = source()
    worker = Worker(partial(make_loaded, folder=tmp_path / "nothing"), weights, "loaded")
    with pytest.raises(WorkerError, match=r"CheckpointError: .*nothing is no saved engine"):
        worker.wait()
    worker.close()
    worker = Worker(make_plain, weights, "plain")
    worker.wait()
    worker._process.kill()
    with pytest.raises(WorkerError, match="the process was killed, most likely because there was not enough memory"):
        worker.run()
    worker.close()


def test_choosing(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("openvino", "nncf") else name)
    assert catalog.choose(["int8", "fp32"], ["none"]) == (["fast fp32", "fast int8"], [])
    names, left_out = catalog.choose(["bf16"], ["diffusers", "openvino-int8"])
    assert names[:3] == ["fast bf16", "diffusers-fp32", "diffusers-bf16"]
    assert left_out == ["openvino-int8: openvino and nncf not installed: pip install 'vpd_fast[openvino]'"]
    assert len(catalog.choose([], ["all"])[1]) == 3
    with pytest.raises(InputError, match="--precision must be some of fp32, bf16, int8, got 'fp8'"):
        catalog.choose(["fp8"], [])
    with pytest.raises(InputError, match="--peers must be all, none, diffusers, openvino or some of .* got 'tvm'"):
        catalog.choose([], ["tvm"])


def test_a_compiler_is_needed_to_compile(monkeypatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert catalog.ENTRIES["diffusers-compile"].why_missing() == "torch.compile needs a C++ compiler: install g++"


def test_extras_exist() -> None:
    """What a message says to install can be installed."""
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '\nopenvino = ["openvino' in pyproject
    assert "nncf" in pyproject
    assert '\ndiffusers = ["diffusers' in pyproject
