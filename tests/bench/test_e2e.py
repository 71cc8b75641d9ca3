"""benchmarks/e2e.py and telemetry.py: no time without agreement, and what rows say."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from vpd_fast import VPD
from vpd_fast.bench import engine_pass, telemetry, timing
from vpd_fast.models.random_weights import randomize

SMI = """#!/bin/sh
case "$*" in
*driver_version*) echo "580.65.06" ;;
*) echo "{answer}" ;;
esac
exit {code}
"""


@pytest.fixture
def results(tmp_path, monkeypatch, script):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    monkeypatch.setattr(timing, "copy_gb_per_s", lambda _: 50.0)
    return lambda: json.loads(next(tmp_path.rglob("e2e.json")).read_text())["rows"]


def test_as_a_program(script, results, capsys) -> None:
    small = ["--device", "cpu", "--model", "small", "--size", "128", "--rounds", "3"]
    assert script("e2e").main([*small, "--precision", "int8"]) == 0
    rows = {row["variant"]: row for row in results()}
    plain = {f"{precision} {backend}" for precision in ("fp32", "bf16 autocast") for backend in ("plain", "sdpa")}
    assert rows.keys() == plain | {"fast int8"}
    for name, row in rows.items():
        assert (row["parity"], row["case"], row["over"], row["rounds"]) == ("passed", "1x3x128x128", "fp32 plain", 3)
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert 0 < row["features_cosine"] <= 1.000001
        assert (row["cosine"] == 1) == name.startswith("fp32")
    assert rows["fp32 plain"]["speedup"] == 1
    assert "segmentation model on" in capsys.readouterr().out


def test_what_does_not_agree_is_not_timed(script, results, monkeypatch, capsys) -> None:
    e2e = script("e2e")
    make = e2e.plain_variants

    def noisy(outputs):
        return replace(outputs, logits=outputs.logits + outputs.logits.std() * torch.randn_like(outputs.logits))

    def broken(images):
        raise RuntimeError("out of memory\nand a long explanation")

    def variants(model: VPD, backend: str, device: str):
        first, second = make(model, backend, device)
        yield first
        yield replace(second, name=f"noisy {backend}", run=lambda images: noisy(first.run(images)))
        yield replace(second, name=f"broken {backend}", run=broken)

    monkeypatch.setattr(e2e, "plain_variants", variants)
    assert e2e.main(["--device", "cpu", "--model", "small", "--size", "64", "--rounds", "3", "--batch", "2"]) == 1
    rows = {row["variant"]: row for row in results()}
    assert {name for name, row in rows.items() if "p50_ms" in row} == {"fp32 plain", "fp32 sdpa"}
    assert rows["noisy plain"]["parity"] == "failed"
    assert rows["noisy plain"]["cosine"] < 0.9
    assert rows["broken sdpa"]["error"] == "RuntimeError: out of memory"
    assert "failed: noisy plain, broken plain, noisy sdpa, broken sdpa" in capsys.readouterr().out


def test_what_runs_on_a_gpu(script, monkeypatch) -> None:
    """The list of variants there, made of a model on the CPU: nothing is run."""
    e2e, compiled = script("e2e"), []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    model = randomize(VPD.empty(engine_pass.MODELS["small"]), seed=0).eval()
    found = [*e2e.plain_variants(model, "plain", "cuda"), *e2e.plain_variants(model, "sdpa", "cuda")]
    found += e2e.fast_variants(model, "bf16", "cuda")
    assert [(v.name, v.precision) for v in found] == [
        ("fp32 plain", "fp32"),
        ("bf16 autocast plain", "bf16"),
        ("fp32 sdpa", "fp32"),
        ("bf16 autocast sdpa", "bf16"),
        ("bf16 channels-last sdpa", "bf16"),
        ("bf16 channels-last sdpa compiled", "bf16"),
        ("fast bf16", "bf16"),
        ("fast bf16 without graphs", "bf16"),
    ]
    assert compiled == [{"mode": "max-autotune", "dynamic": False}]
    weights = {v.name: v.weights for v in found}
    assert weights["fp32 sdpa"] == weights["fp32 plain"]
    assert weights["bf16 channels-last sdpa"] == pytest.approx(weights["fp32 plain"] / 2, rel=1e-3)
    ways = {way: ([v.name for v in variants], graphs) for way, (variants, graphs) in e2e.ways(found, "cuda").items()}
    assert ways["calls"] == ([v.name for v in found], False)
    assert ways["replays"] == ([n for n in weights if "compiled" not in n and "without" not in n], True)
    assert e2e.ways(found, "cpu").keys() == {"calls"}
    images = script("e2e").make_images(1, 128)
    outputs = {v.name: v.run(images) for v in found if v.name in ("fp32 plain", "bf16 channels-last sdpa")}
    assert e2e.passes(e2e.agreement(outputs["bf16 channels-last sdpa"], outputs["fp32 plain"]), "bf16")


def test_precisions_that_cannot_be_had_are_named(script, monkeypatch, capsys) -> None:
    e2e = script("e2e")
    monkeypatch.setattr(e2e, "GATES", {"fp32": 1.0, "fp16": 1.0})
    model = VPD.empty(engine_pass.MODELS["small"]).to_empty(device="cpu").eval()
    names = [v.name for v in e2e.make_variants(model, [], ["fp16", "bf16"], False)]
    assert names == ["fp32 plain", "bf16 autocast plain"]
    printed = capsys.readouterr().out
    assert "left out: fast fp16: precision" in printed
    assert "left out: fast bf16: there is no gate of agreement for it" in printed


def test_without_a_gpu(script, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="PyTorch finds no NVIDIA GPU here"):
        script("e2e").main(["--device", "cuda"])


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts a program of that name on the path that answers so."""
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)  # importing it fails
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def install(answer: str, code: int = 0) -> None:
        (tmp_path / "nvidia-smi").write_text(SMI.format(answer=answer, code=code))
        (tmp_path / "nvidia-smi").chmod(0o755)

    return install


def test_telemetry(script, smi) -> None:
    smi("1980, 2619, 412.35, 61")
    seen = telemetry.Telemetry("cuda")
    seen("fast")
    smi("1755, 2619, 700.0, 63")
    seen("fast")
    seen("fast")
    assert seen.medians("fast") == {"sm_mhz": 1755, "memory_mhz": 2619, "watts": 700, "celsius": 63}
    assert telemetry.facts()["driver"] == "580.65.06"


@pytest.mark.parametrize("answer", ["1980, 2619, [N/A], 61", "1980, 2619, [Not Supported], 61"])
def test_telemetry_of_what_a_gpu_does_not_tell(script, smi, answer: str) -> None:
    smi(answer)
    seen = telemetry.Telemetry("cuda")
    seen("fast")
    assert seen.medians("fast") == {"sm_mhz": 1980, "memory_mhz": 2619, "watts": None, "celsius": 61}


def test_no_telemetry(script, smi, monkeypatch) -> None:
    nothing = dict.fromkeys(("sm_mhz", "memory_mhz", "watts", "celsius"))
    smi("No devices were found", code=6)
    for device in ("cuda", "cpu"):
        seen = telemetry.Telemetry(device)
        seen("fast")
        assert seen.medians("fast") == nothing
    monkeypatch.setenv("PATH", "/nonexistent")
    seen = telemetry.Telemetry("cuda")
    seen("fast")
    assert seen.medians("fast") == nothing
    assert telemetry.facts()["driver"] is None
