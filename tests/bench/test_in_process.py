"""`vpd-fast bench --in-process` and telemetry: no speed-up without agreement, and what rows say."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vpd_fast import VPD, VPDConfig
from vpd_fast.bench import catalog, telemetry, timing
from vpd_fast.bench.in_process import Shared, Turn, nbytes
from vpd_fast.bench.parity import agreement
from vpd_fast.bench.variants import Case, ModelVariant
from vpd_fast.bench.worker import WorkerError
from vpd_fast.cli.main import run
from vpd_fast.errors import InputError
from vpd_fast.models.random_weights import randomize

COMPILED = [f"sdpa channels-last compiled{mode}" for mode in ("", " reduce-overhead", " max-autotune")]
SMI = """#!/bin/sh
case "$*" in
*driver_version*) echo "580.65.06" ;;
*) echo "{answer}" ;;
esac
exit {code}
"""


@pytest.fixture
def config(tiny_backbone) -> VPDConfig:
    return VPDConfig(num_classes=5, channels=32, base_size=128, backbone=tiny_backbone)


@pytest.fixture
def small(tmp_path, config) -> list[str]:
    """Options that build a small random model and measure little of it."""
    config.save(tmp_path / "config.json")
    sizes = ["--config", str(tmp_path / "config.json"), "--size", "64", "--rounds", "2", "--threads", "1"]
    return ["bench", "--in-process", *sizes, "--json", str(tmp_path / "bench.json")]


@pytest.fixture
def shared(tmp_path, config) -> Shared:
    return Shared(randomize(VPD.empty(config), seed=0).eval(), tmp_path, 1)


def rows_in(folder: Path) -> dict[str, dict]:
    return {row["variant"]: row for row in json.loads((folder / "bench.json").read_text())["rows"]}


def test_as_a_program(small, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(catalog, "PLAIN_FORMS", {"": {}})  # bfloat16 takes long where a CPU has no instructions for it
    assert run([*small, "--precision", "fp32", "--batch", "2"]) == 0
    rows = rows_in(tmp_path)
    assert list(rows) == ["plain", "sdpa", "fast fp32"]
    for name, row in rows.items():
        # The baseline takes part in the rounds of the two others.
        assert (row["case"], row["over"], row["rounds"]) == ("2x3x64x64", "plain", 4 if name == "plain" else 2)
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert list(row["stages_ms"]) == ["encoder", "unet", "head", "post"]
        assert row["peak_mib"]["run"] > 50
        assert name == "plain" or row["parity"] == "passed"
    assert rows["plain"]["speedup"] == 1
    assert rows["sdpa"]["gate"] == 0.9999
    assert "segmentation, 2x3x64x64, 1 threads" in capsys.readouterr().out


def test_no_speedup_for_what_does_not_agree_or_run(small, tmp_path, monkeypatch) -> None:
    def noisy(variant: ModelVariant):
        tensors = variant.tensors
        variant.tensors = lambda lap: (*tensors(lap)[:2], *(torch.randn_like(x.float()) for x in tensors()[2:]))
        return variant

    def broken(source: Shared):
        raise RuntimeError("out of memory\nand a long explanation")

    sdpa = catalog.ENTRIES["sdpa"]
    monkeypatch.setitem(catalog.ENTRIES, "sdpa", replace(sdpa, make=lambda source: noisy(sdpa.make(source))))
    monkeypatch.setitem(catalog.ENTRIES, "fast fp32", replace(catalog.ENTRIES["fast fp32"], make=broken))
    monkeypatch.setattr(catalog, "PLAIN_FORMS", {"": {}})
    assert run([*small, "--precision", "fp32"]) == 1
    rows = rows_in(tmp_path)
    assert rows["sdpa"]["parity"] == "failed"
    assert not [name for name in rows["sdpa"] if "speedup" in name]
    assert rows["fast fp32"]["error"] == "RuntimeError: out of memory"
    monkeypatch.setitem(catalog.ENTRIES, "fast fp32", sdpa)
    assert run([*small, "--precision", "none"]) == 1  # because of what does not agree


def test_what_runs_on_a_gpu(monkeypatch, shared) -> None:
    """The list of variants there, made of a model on the CPU."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    monkeypatch.setattr(catalog.Policy, "check_device", lambda *_: None)
    names, missing = catalog.choose_in_process("cuda", ["sdpa"], ["bf16"], True)
    assert (["plain", *names], missing) == (
        ["plain", "plain autocast", "sdpa", "sdpa autocast", "sdpa channels-last", *COMPILED,
         "fast bf16", "fast bf16 without graphs"], [],
    )  # fmt: skip
    assert not set(COMPILED) & set(catalog.choose_in_process("cuda", ["sdpa"], ["bf16"], False)[0])
    assert catalog.choose_in_process("cuda", [], None, False)[0][1::2] == [f"fast {p}" for p in catalog.GATES]
    assert [name for name in names if not catalog.may_be_replayed(name)] == [*COMPILED, "fast bf16 without graphs"]
    others = [name for name in names if name not in COMPILED]
    assert catalog.in_order("cuda", names) == [("calls", others), ("replays", others[:-1]), ("calls", COMPILED)]
    assert catalog.in_order("cuda", others) == [("calls", others), ("replays", others[:-1])]
    made = {name: catalog.ENTRIES[name].make(shared) for name in ("plain", *names)}
    modes = ("default", "reduce-overhead", "max-autotune")
    assert compiled == [{"mode": mode, "dynamic": False, "fullgraph": True} for mode in modes]
    assert made["fast bf16"].model is made["fast bf16 without graphs"].model
    assert nbytes(made["sdpa channels-last"].model) == pytest.approx(nbytes(made["plain"].model) / 2, rel=1e-2)
    plain, other = (dict(made[name].model.named_parameters()) for name in ("plain", "sdpa"))
    assert all(parameter.data_ptr() == other[name].data_ptr() for name, parameter in plain.items())


@pytest.mark.slow  # CPUs without instructions for bfloat16 take a quarter of a minute
def test_forms_of_a_plain_model_agree(monkeypatch, shared) -> None:
    """The compiled one is one graph, which is run here as it is."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, **options: compile_(f, backend="eager", **options))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    results = {}
    names = ("plain autocast", "sdpa channels-last compiled")
    for name in ("plain", *names):
        variant = catalog.ENTRIES[name].make(shared)
        variant.prepare(Case(128))
        results[name] = variant.run()
    for name in names:
        found = agreement(results[name][1], results["plain"][1])
        assert min(found["features"]) > 0.99, found  # of a small network
    assert list(results["sdpa channels-last compiled"][0]) == ["pass"]


def test_compiling_has_a_limit(monkeypatch, small, tmp_path, capsys) -> None:
    """Of whatever catches what goes wrong in between; the row says so, and the other variants have theirs."""

    def compile_(function, **options):
        def never() -> None:
            while True:
                with contextlib.suppress(Exception):
                    time.sleep(10)

        return never

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    monkeypatch.setattr(catalog, "choose_in_process", lambda *_: ([COMPILED[1], "sdpa"], []))
    assert run([*small, "--compile-seconds", "1", "--rounds", "1"]) == 1
    rows = rows_in(tmp_path)
    error = "TimeoutError: compiling and the first passes took longer than 1 s"
    assert rows[COMPILED[1]]["error"] == error
    assert rows["sdpa"]["parity"] == "passed"
    assert f"{COMPILED[1]}, 1x3x64x64: FAILED: {error}\n" in capsys.readouterr().out


def test_a_limit_of_time() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with timing.time_limit(None, "this"), timing.time_limit(60, "that"):
        pass
    with pytest.raises(TimeoutError, match=r"that took longer than 0\.05 s"), timing.time_limit(0.05, "that"):
        time.sleep(10)
    with pytest.raises(KeyError), timing.time_limit(60, "that"):
        raise KeyError
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_rows_come_as_they_are_measured(monkeypatch, small, tmp_path, capsys) -> None:
    """Before the next variant is made, those before it are printed and in the file."""
    entries, printed = catalog.ENTRIES, []

    def make(source: Shared):
        printed.append(capsys.readouterr().out)
        content = json.loads((tmp_path / "bench.json").read_text())
        assert not content["finished"]
        assert [(row["variant"], row["rounds"]) for row in content["rows"]] == [("plain", 1), ("sdpa", 1)]
        return entries["sdpa"].make(source)

    monkeypatch.setitem(catalog.ENTRIES, "fast fp32", replace(entries["fast fp32"], make=make))
    monkeypatch.setattr(catalog, "choose_in_process", lambda *_: (["sdpa", "fast fp32"], []))
    assert run([*small, "--rounds", "1"]) == 0
    assert [line.partition(":")[0] for line in printed[0].splitlines()] == ["plain, 1x3x64x64", "sdpa, 1x3x64x64"]
    assert " ms per image, " in printed[0]
    assert "x faster" in printed[0]
    assert json.loads((tmp_path / "bench.json").read_text())["finished"]
    out = capsys.readouterr().out
    assert out.startswith("fast fp32, 1x3x64x64: ")
    assert "segmentation, 1x3x64x64, 1 threads" in out


def test_replays_are_timed_as_a_whole(monkeypatch, shared, tmp_path) -> None:
    from vpd_fast.bench import in_process

    monkeypatch.setattr(in_process, "as_graph", lambda function: function)
    shared.timed = "replays"
    turn = Turn(catalog.ENTRIES["sdpa"].make, shared, "sdpa")
    assert turn.wait() == {"resident": 0, "peak": 0}
    assert turn.prepare(Case(64), tmp_path / "outputs.safetensors")["peak"] > 50 << 20
    assert list(turn.run()) == ["pass"]
    again = Turn(catalog.ENTRIES["sdpa"].make, shared, "sdpa")
    again.wait()
    assert again._variant is turn._variant
    with pytest.raises(WorkerError, match="InputError: images must"):
        turn.prepare(Case(100), tmp_path / "outputs.safetensors")


def test_what_cannot_be_had(monkeypatch, small, capsys) -> None:
    names, missing = catalog.choose_in_process("cpu", ["flash-attn"], ["fp16", "int8"], True)
    assert names[0] == "plain autocast"
    assert names[-1] == "fast int8"
    assert [line.split(":")[0] for line in missing][-1] == "fast fp16"
    with pytest.raises(InputError, match="--precision must be some of fp32, bf16, fp16, int8, fp8, got 'int4'"):
        catalog.choose_in_process("cpu", [], ["int4"], True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run([*small, "--device", "cuda", "--precision", "none"]) == 2
    assert "--device cuda: PyTorch finds no NVIDIA GPU here" in capsys.readouterr().err
    assert run(["bench", "--device", "cuda"]) == 2
    assert "--device must be cpu, or cuda with --in-process, got 'cuda'" in capsys.readouterr().err


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts a program of that name on the path that answers so."""
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)  # importing it fails
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def install(answer: str, code: int = 0) -> None:
        (tmp_path / "nvidia-smi").write_text(SMI.format(answer=answer, code=code))
        (tmp_path / "nvidia-smi").chmod(0o755)

    return install


def test_telemetry(smi) -> None:
    smi("1980, 2619, 412.35, 61")
    seen = telemetry.Telemetry("cuda")
    seen("fast")
    smi("1755, 2619, 700.0, 63")
    seen("fast")
    seen("fast")
    assert seen.medians("fast") == {"sm_mhz": 1755, "memory_mhz": 2619, "watts": 700, "celsius": 63}
    assert telemetry.facts()["driver"] == "580.65.06"


@pytest.mark.parametrize("answer", ["1980, 2619, [N/A], 61", "1980, 2619, [Not Supported], 61"])
def test_telemetry_of_what_a_gpu_does_not_tell(smi, answer: str) -> None:
    smi(answer)
    seen = telemetry.Telemetry("cuda")
    seen("fast")
    assert seen.medians("fast") == {"sm_mhz": 1980, "memory_mhz": 2619, "watts": None, "celsius": 61}


def test_no_telemetry(smi, monkeypatch) -> None:
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
