"""benchmarks/layers.py: what it writes, and that its way for GPUs times the same operations."""

from __future__ import annotations

import json

import pytest
import torch

import vpd_fast
from vpd_fast import VPD
from vpd_fast.bench import peaks, timing
from vpd_fast.bench.catalog import why_unusable
from vpd_fast.engine.policy import PRECISIONS
from vpd_fast.models.random_weights import randomize


@pytest.fixture
def results(tmp_path, monkeypatch, script):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    monkeypatch.setattr(timing, "copy_gb_per_s", lambda _: 50.0)
    return lambda suite: json.loads(next(tmp_path.rglob(f"{suite}.json")).read_text())


@pytest.fixture
def rates(monkeypatch, script) -> dict[str, float]:
    rates = {"fp32": 100.0, "bf16": 200.0, "int8": 400.0}
    monkeypatch.setattr(peaks, "measured", lambda device, precisions: rates)
    return rates


def test_rows(script, results, rates: dict[str, float], capsys) -> None:
    script("layers").main(["--model", "small", "--size", "64", "--rounds", "2", "--precision", "bf16", "--rows", "3"])
    content = results("layers")
    assert (content["kind"], content["peak_gflop_per_s"], content["copy_gb_per_s"]) == ("cpu", rates, 50.0)
    rows = {(row["stage"], row["part"]): row for row in content["rows"]}
    assert len(rows) == len(content["rows"])
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1, abs=0.01)
    for row in rows.values():
        assert (row["precision"], row["size"], row["model"]) == ("bf16", 64, "small")
        assert row["ms"] > 0 or row["part"] == "rest"
    assert rows["encoder", "3x3 at 64"]["calls"] == 4
    assert {("all", "rest"), ("post", "upsample_argmax"), ("unet", "cross-attention at 8")} < rows.keys()
    printed = capsys.readouterr().out
    assert "bf16, 1x3x64x64:" in printed
    assert printed.count("\nencoder") + printed.count("\nunet") + printed.count("\nall") <= 4


def test_a_rate_against_the_peak_counts_the_products_that_are_made(script, rates: dict[str, float]) -> None:
    layers, images = script("layers"), torch.zeros(1, 3, 128, 128)
    counts = layers.counted(layers.MODELS["small"], "bf16", "cpu", images)
    found = layers.Pass()
    key = ("encoder", "3x3 at 128")
    for operation in counts[key]:
        found.add(operation.label, 1e-3)
    found.rest = 1e-3
    first, rest = layers.summary([found], counts, rates, {"size": 128})
    gflop = 4 * 2 * 9 * 128**2 * 64**2 / 1e9
    assert (first["part"], rest["part"]) == ("3x3 at 128", "rest")
    assert first["gflop_per_s"] == pytest.approx(gflop / 4e-3, rel=1e-3)
    assert first["of_peak"] == pytest.approx(gflop * 4 / 9 / 4e-3 / rates["bf16"], rel=1e-3)
    assert first["share"] == pytest.approx(0.8)


def test_a_gpu_times_the_operations_of_a_pass(script, monkeypatch) -> None:
    """With a clock that says 2 ms cold, 1 ms warm and 1 s for the pass; on the CPU, where the rest is the same."""
    layers = script("layers")
    model = vpd_fast.optimize(randomize(VPD.empty(layers.MODELS["small"]), seed=0).eval(), "bf16")
    images, calls = torch.zeros(1, 3, 64, 64), []

    def measure(variants, device, rounds, cold):
        assert (device, rounds) == ("cuda", 5)
        calls.append(cold)
        for call in variants.values():
            call()
        whole = len(calls) > 2 * count
        return {name: [1.0 if whole else 2e-3 if cold else 1e-3] for name in variants}

    with layers.labelled(model) as run, torch.inference_mode():
        run(images)
        on_cpu = layers.timed_on_cpu(run, images)
        count = sum(part.calls for part in on_cpu.parts.values())
        monkeypatch.setattr(layers, "measure", measure)
        on_gpu = layers.timed_on_gpu(run, images, rounds=5)
    assert {key: part.calls for key, part in on_gpu.parts.items()} == {k: p.calls for k, p in on_cpu.parts.items()}
    for part in on_gpu.parts.values():
        assert part.seconds == pytest.approx(2e-3 * part.calls)
        assert part.warm == pytest.approx(1e-3 * part.calls)
    assert on_gpu.rest == pytest.approx(1.0 - 2e-3 * count)
    assert calls == [True, False] * count + [True]
    (row,) = [r for r in layers.summary([on_gpu], layers.defaultdict(list), {}, {}) if r["part"] == "upsample_argmax"]
    assert (row["ms"], row["warm_ms"], row["calls"]) == (2.0, 1.0, 1)


def test_without_a_gpu(script, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="PyTorch finds no NVIDIA GPU here"):
        script("layers").main(["--device", "cuda"])


def test_measure_tells_whose_turn_it_was(script) -> None:
    turns = []
    times = timing.measure({"a": lambda: None, "b": lambda: None}, rounds=3, after=turns.append)
    assert turns == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_rates_of_libraries(script, monkeypatch, capsys) -> None:
    monkeypatch.setitem(peaks.SIDE, "cpu", 64)
    assert [p for p in PRECISIONS if why_unusable(p, "cpu") is None] == ["fp32", "bf16", "int8"]
    found = peaks.measured("cpu", ["fp32", "int8", "fp8"])
    assert found.keys() == {"fp32", "int8"}
    assert min(found.values()) > 0
    assert "no rate of fp8 products: NotImplementedError: there is no product of fp8 on cpu" in capsys.readouterr().out


def test_a_captured_pass_has_no_times(monkeypatch) -> None:
    """Whoever waits for an event of a stream that is being captured ends the capture with an error."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            raise RuntimeError("operation not permitted on an event last recorded in a capturing stream")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    watch = timing.Stopwatch("cuda")
    watch.lap("pass")
    assert watch.seconds == {}
