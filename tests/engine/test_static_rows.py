"""Engines whose attention and feed-forward layers round their results for the layers after them."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vpd_fast
from vpd_fast import ops
from vpd_fast.bench import launches
from vpd_fast.bench.engine_pass import MODELS
from vpd_fast.engine import Policy
from vpd_fast.engine.layers import Linear
from vpd_fast.engine.model import FastVPD
from vpd_fast.errors import CheckpointError, InputError

from .golden_cases import assert_agrees_with_the_original
from .test_optimize import conditioned, cosine, result, shared_model, some_images

STATIC = Policy(winograd=False, static_rows=True, emulate=True)
TASKS = ("segmentation", "referring", "depth")


def inputs_of(task: str, seed: int = 5) -> tuple[Tensor, ...]:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    return conditioned(shared_model(task), images)


def static_model(task: str) -> FastVPD:
    """Calibrated with other images, the referring model with other sentences, too."""
    calibration: Any = inputs_of(task, seed=6)
    calibration = [calibration] if task == "referring" else calibration[0]
    return vpd_fast.optimize(shared_model(task), "int8", policy=STATIC, calibration=calibration)


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each operator was asked for int8, and `linear` was given it."""
    found: Counter[str] = Counter()

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found[name] += kwargs.get("rounding") is not None
            found[f"{name} of int8"] += args[0].dtype == torch.int8
            return function(*args, **kwargs)

        return call

    for name in ("linear", "self_attention", "cross_attention_maps_into"):
        monkeypatch.setattr(ops, name, noted(name, getattr(ops, name)))
    return found


@pytest.mark.parametrize("task", TASKS)
def test_agrees(task: str, rounded: Counter) -> None:
    """As the usual engine does; every layer after attention and GEGLU is given rounded rows."""
    model, inputs = shared_model(task), inputs_of(task)
    with torch.no_grad():
        expected = result(model, inputs)
    fast = static_model(task)
    rounded.clear()
    actual = result(fast, inputs)
    print(f"{task}: cosine {cosine(actual, expected):.6f}")
    assert cosine(actual, expected) >= 0.995
    transformers = sum(name.endswith(".ff2") for name in fast.layers)
    attentions = transformers if task == "depth" else 2 * transformers  # cross-attention to one token is a bias
    assert rounded["linear"] == transformers
    assert rounded["self_attention"] + rounded["cross_attention_maps_into"] == attentions
    images = 2 if task == "depth" else 1  # whose projections have a bias each, of its scene
    assert rounded["linear of int8"] == transformers + images * attentions


def test_layers_that_stay(rounded: Counter) -> None:
    """Layers of more bits round nothing, and what makes their rows does not, either."""
    policy = dataclasses.replace(STATIC, precisions={"unet.*.attn1.out": "bf16", "unet.*.ff1": "bf16"})
    fast = vpd_fast.optimize(shared_model(), "int8", policy=policy, calibration=inputs_of("segmentation", 6)[0])
    rounded.clear()
    fast(*inputs_of("segmentation"))
    transformers = sum(name.endswith(".ff2") for name in fast.layers)
    assert rounded["linear"] == transformers
    assert rounded["linear of int8"] == 2 * transformers
    reasons = {row["name"]: row["reason"] for row in fast.report().rows()}
    assert {name for name, reason in reasons.items() if "input rounded by what makes it" in reason} == {
        name for name in reasons if name.endswith((".attn2.out", ".ff2"))
    }


def test_rows_that_nobody_has_rounded() -> None:
    """A layer rounds them by itself, with the same result."""
    layer = static_model("segmentation").layers["unet.middle_block.1.ff2"]
    assert isinstance(layer, Linear)
    assert layer.input_rounding is not None
    x = torch.randn(1, 2, 3, layer.weight.k)
    numbers = ops.rounding.round_columns(x, layer.input_rounding)
    assert torch.equal(layer(x), layer(numbers))
    assert torch.equal(layer(x), layer(x[..., :40], x2=x[..., 40:]))


@pytest.mark.parametrize("task", ["segmentation", *(pytest.param(t, marks=pytest.mark.slow) for t in TASKS[1:])])
def test_scales_are_saved(tmp_path: Path, task: str) -> None:
    fast, inputs = static_model(task), inputs_of(task)
    fast.save(tmp_path)
    loaded = vpd_fast.load_engine(tmp_path)
    assert torch.equal(result(loaded, inputs), result(fast, inputs))
    assert loaded.report(sensitivity=True).rows() == fast.report(sensitivity=True).rows()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("unet.middle_block.1.ff2", (2, 3), r"its input_rounding is torch.float32 \(2, 3\)"),
        ("unet.middle_block.1.ff1", (2, 64), "has an input_rounding, but nothing rounds its input"),
    ],
)
def test_spoiled_files(tmp_path: Path, name: str, shape: tuple[int, ...], message: str) -> None:
    fast = static_model("segmentation")
    fast.layers[name] = dataclasses.replace(fast.layers[name], input_rounding=torch.ones(shape))
    fast.save(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        vpd_fast.load_engine(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gate"), [("seg_sd15", 0.997), ("refer_sd15", 0.995)])
def test_full_size_agrees_with_the_original(
    golden: Callable, name: str, gate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image of calibration has the same noise at other places. The numbers are printed (pytest -rP)."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the references compute in seconds what it takes an hour for
    case = golden(name)
    inputs, expected = case.inputs(), case.tensors
    calibration: Any = inputs[0].flip(3).roll(37, 2)
    calibration = [(calibration, *inputs[1:])] if name == "refer_sd15" else calibration
    fast = vpd_fast.optimize(case.model(), "int8", policy=STATIC, calibration=calibration)
    with torch.no_grad():
        assert_agrees_with_the_original(case, inputs, expected, fast, gate)


def test_an_engine_without_them_is_as_it_was(tmp_path: Path) -> None:
    """Its file has no word of them, so that engines of former versions are still read."""
    vpd_fast.optimize(shared_model(), "int8").save(tmp_path)
    settings = json.loads((tmp_path / "engine.json").read_text())
    for layer in settings["layers"].values():
        layer.pop("input_rounding", None)
    (tmp_path / "engine.json").write_text(json.dumps(settings))
    vpd_fast.load_engine(tmp_path)


@pytest.mark.parametrize(
    ("precision", "policy", "calibration", "message"),
    [
        ("int8", STATIC, None, "needs the ranges of activations"),
        ("int8", Policy(static_rows=True), some_images(), "is for GPUs"),
        ("bf16", STATIC, None, 'is for precision "int8"'),
    ],
)
def test_where_there_are_none(precision: str, policy: Policy, calibration: Tensor | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        vpd_fast.optimize(shared_model(), precision, policy=policy, calibration=calibration)


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kernel that prepares rows three fewer for each transformer, and none more of others."""
    monkeypatch.setattr(launches, "_launches", lambda operator, implementation, _: implementation == "triton")
    counts = []
    for policy in (Policy(), Policy(static_rows=True)):
        found: Counter[str] = Counter()
        model = launches.EmptyModel(MODELS["small"], "int8", policy)
        record = lambda _, kernel, *__, found=found: found.update([kernel.fn.__name__])  # noqa: E731
        model.record(2, 64, record, ["sm_90"])
        counts.append(found)
    transformers = sum(name.endswith(".ff2") for name in model.model.layers)
    fewer = counts[0] - counts[1]
    gpus = len(launches.GPUS["sm_90"])
    assert fewer == {"_prologue_kernel": 3 * transformers * gpus}
    assert not counts[1] - counts[0]
