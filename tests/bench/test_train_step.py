"""benchmarks/train_step.py: no time without agreement of losses and gradients, and what rows say."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import nn

from vpd_fast import VPD, VPDConfig
from vpd_fast.bench import engine_pass, timing
from vpd_fast.bench.variants import Source
from vpd_fast.models.random_weights import randomize
from vpd_fast.models.unet import SpatialTransformer, UNetBlock
from vpd_fast.training.groups import parameter_groups

from ..helpers.backbones import LEAST

pytestmark = pytest.mark.usefixtures("quick_workers")
SMALL = ["--device", "cpu", "--model", "small", "--size", "128", "--steps", "1"]


@pytest.fixture
def results(tmp_path, monkeypatch, script):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    monkeypatch.setattr(timing, "copy_gb_per_s", lambda _: 50.0)
    return lambda: json.loads(next(tmp_path.rglob("train_step.json")).read_text())


@pytest.fixture
def tiny(monkeypatch, script):
    """The benchmark with a smaller model."""
    benchmark = script("train_step")
    config = VPDConfig(num_classes=5, channels=32, base_size=128, backbone=LEAST)
    monkeypatch.setattr(benchmark, "MODELS", {"small": config})
    return benchmark


@pytest.fixture
def here(monkeypatch, tiny):
    """Variants are measured in this process, where their steps can be looked at."""
    monkeypatch.setattr(tiny, "Worker", Here)
    return tiny


class Here:
    """Stands for a worker whose process is this one."""

    def __init__(self, make, source, _: str) -> None:
        self.step = make(source)

    def wait(self) -> None:
        """It is made."""

    def call(self, action: str, *arguments):
        return getattr(self.step, action)(*arguments)

    def close(self) -> None:
        """Nothing was started."""


def test_as_a_program(tiny, results, capsys) -> None:
    assert tiny.main([*SMALL, "--variants", "fp32"]) == 0
    content = results()
    plain, fp32 = content["rows"]
    assert (plain["variant"], fp32["variant"]) == ("plain", "fp32")
    for row in (plain, fp32):
        assert (row["parity"], row["case"], row["steps"]) == ("passed", "1x3x128x128", 1)
        assert row["min_ms"] <= row["p50_ms"] <= row["max_ms"]
        parts = sum(row[f"{part}_ms"] for part in ("encoder", "forward", "backward", "optimizer"))
        assert 0 < parts < 2 * row["max_ms"]
        assert row["peak_gib"] > 0.1
    assert (plain["loss_difference"], plain["speedup"]) == (0, 1)
    assert 0 <= fp32["loss_difference"] < 1e-4
    assert min(fp32["cosine_latents"], fp32["cosine_unet"]) > 0.9999
    assert content["environment"]["torch"] == version("torch")  # PyPI's is named without its build
    assert content["activations_gib_estimated"].keys() == {"1"}
    assert "segmentation model on" in capsys.readouterr().out


def test_what_does_not_agree_is_not_timed(here, results, monkeypatch, capsys) -> None:
    sampled = here.sampled_gradients
    calls = []

    def noisy(model: VPD, groups: dict[str, list[nn.Parameter]]) -> dict[str, torch.Tensor]:
        calls.append(model)
        found = sampled(model, groups)
        if len(calls) == 2:
            found["unet"] += found["unet"].std() * torch.randn_like(found["unet"])
        return found

    monkeypatch.setattr(here, "sampled_gradients", noisy)
    assert here.main([*SMALL, "--variants", "fp32"]) == 1
    plain, fp32 = results()["rows"]
    assert "p50_ms" in plain
    assert "p50_ms" not in fp32
    assert fp32["parity"] == "failed"
    assert fp32["cosine_unet"] < 0.8
    assert fp32["cosine_rest"] > 0.9999
    assert "failed: fp32" in capsys.readouterr().out


def test_a_process_that_ends_is_a_row(tiny, results, monkeypatch) -> None:
    call = tiny.Worker.call

    def killed(self, *message):
        self._process.kill()
        return call(self, *message)

    monkeypatch.setattr(tiny.Worker, "call", killed)
    assert tiny.main([*SMALL, "--variants", "fp32"]) == 1
    (row,) = results()["rows"]
    assert row["error"] == "the process was killed, most likely because there was not enough memory"


def test_sampled_gradients_stand_for_all_of_them(script) -> None:
    benchmark = script("train_step")
    model = randomize(VPD.empty(engine_pass.MODELS["small"]), seed=0)
    generator = torch.Generator().manual_seed(1)
    groups = {g["name"]: g["params"] for g in parameter_groups(model, lr=1, weight_decay=1, preset="segmentation")}
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * parameter.detach().abs().mean()
    found = benchmark.sampled_gradients(model, groups)
    for name, parameters in groups.items():
        exact = torch.stack([p.grad.norm() for p in parameters]).norm()
        # Tensors are sampled at 4096 places at least, each a mean of squares of normal numbers.
        assert found[name].norm().item() == pytest.approx(exact.item(), rel=5 * (2 / 4096) ** 0.5)
        assert len(found[name]) == sum(min(p.numel(), benchmark.SAMPLE) for p in parameters)
    again = benchmark.sampled_gradients(model, groups)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_gates(script) -> None:
    benchmark = script("train_step")
    fine = {"loss": 1e-5, "latents": 0.99995, "unet": 0.99995}

    def passes(variant: str, **changes: float) -> bool:
        return benchmark.passes(fine | changes, benchmark.VARIANTS[variant])

    assert passes("fp32")
    assert not passes("fp32", loss=1e-3)
    assert not passes("fp32", rest=0.999)
    assert not passes("fp32", latents=0.9998)
    assert passes("bf16", loss=1e-3, unet=0.991, latents=0.9991)
    assert not passes("bf16", latents=0.9989)
    assert not passes("bf16", loss=float("nan"))
    assert not passes("bf16", unet=float("nan"))


def test_what_is_recomputed(script) -> None:
    benchmark = script("train_step")
    model = VPD.empty(engine_pass.MODELS["small"])

    def recomputed(kind: type) -> set[bool]:
        return {module.gradient_checkpointing for module in model.modules() if isinstance(module, kind)}

    for what, blocks, transformers in (
        ("transformers", {False}, {True}), ("all", {True}, {True}), ("none", {False}, {False})
    ):  # fmt: skip
        benchmark.set_recompute(model, what)
        assert (recomputed(UNetBlock), recomputed(SpatialTransformer)) == (blocks, transformers)


def test_labels(script) -> None:
    labels = script("train_step").make_labels(2, 320, 7)
    assert (labels.shape, labels.dtype) == ((2, 320, 320), torch.int64)
    assert set(labels.unique().tolist()) == {*range(7), 255}
    assert labels[0, :32, :32].unique().numel() == 1
    assert 0.02 < (labels == 255).float().mean() < 0.25


def test_steps_change_weights_and_leave_no_gradients(here, tmp_path) -> None:
    """The recomputed bf16 step on small shapes, part by part."""
    benchmark = here
    config = benchmark.MODELS["small"]
    step = benchmark.Step(Source(tmp_path, tmp_path, 1), benchmark.VARIANTS["bf16 recomputed"], config, 1, 128)
    before = step.model.unet.unet.diffusion_model.input_blocks[0][0].weight.detach().clone()
    encoder = {name: t.clone() for name, t in step.model.encoder_vq.state_dict().items()}
    loss, seconds = step.run()
    assert torch.isfinite(loss)
    assert list(seconds) == ["encoder", "forward", "backward", "optimizer"]
    assert not torch.equal(step.model.unet.unet.diffusion_model.input_blocks[0][0].weight, before)
    assert all(torch.equal(t, encoder[name]) for name, t in step.model.encoder_vq.state_dict().items())
    assert all(p.grad is None for p in step.model.parameters())
    estimated = benchmark.estimates(config, 1, 128)
    assert estimated["bf16 recomputed"] < estimated["bf16"]


def test_needs_the_gpu_it_was_asked_for(script, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="PyTorch finds no NVIDIA GPU here"):
        script("train_step").main(["--device", "cuda"])


def test_stored_results_passed_their_gates() -> None:
    """What the README says comes from here."""
    stored = [*(Path(__file__).parents[2] / "benchmarks" / "results").glob("*/train_step.json")]
    for path in stored:
        rows = json.loads(path.read_text())["rows"]
        assert rows[0]["variant"] == "plain"
        assert all(row["parity"] == "passed" for row in rows if "p50_ms" in row)
