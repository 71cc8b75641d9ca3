"""`vpd-fast bench` on a small random model."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import vpd_fast
from vpd_fast import VPD, VPDConfig
from vpd_fast.bench.worker import Worker
from vpd_fast.cli.main import run
from vpd_fast.models.random_weights import randomize

SPEEDUPS = ("speedup", "backbone_speedup")
pytestmark = pytest.mark.usefixtures("quick_workers")


@pytest.fixture
def small(tmp_path, tiny_backbone) -> list[str]:
    """Options that build a small random model and measure little of it."""
    path = tmp_path / "config.json"
    VPDConfig(num_classes=5, channels=32, base_size=128, backbone=tiny_backbone).save(path)
    return ["--random-weights", "1", "--config", str(path), "--size", "64", "--peers", "none"]


def test_tables_numbers_and_chart(small, tmp_path, capsys) -> None:
    json_path, chart = tmp_path / "new" / "bench.json", tmp_path / "bench.png"
    command = ["bench", *small, "--precision", "fp32,int8", "--batch", "1,2", "--rounds", "2", "--threads", "1"]
    assert run([*command, "--json", str(json_path), "--chart", str(chart)]) == 0
    values = json.loads(json_path.read_text())
    assert values["finished"] is True
    assert values["environment"]["threads"] == 1
    assert values["model"]["random_weights"] == 1
    rows = values["rows"]
    assert [(row["case"], row["variant"]) for row in rows] == [
        (case, variant) for case in ("1x3x64x64", "2x3x64x64") for variant in ("plain", "fast fp32", "fast int8")
    ]
    for row in rows:
        assert row["rounds"] == 2
        assert set(row["stages_ms"]) == {"encoder", "unet", "head", "post"}
        assert row["peak_mib"]["run"] > 50
        assert row["peak_mib"]["build"] > 50
        passed = row["variant"] == "plain" or row["parity"] == "passed"
        assert all((name in row) is passed for name in SPEEDUPS)
    for row in rows[1], rows[4]:
        assert row["parity"] == "passed"
        assert len(row["cosines"]["features"]) == 4
        assert row["equal_labels"] > 0.99
    # The model is saved where it needs most, and loaded from there.
    assert [("loaded" in row["peak_mib"]) for row in rows] == [False] * 5 + [True]
    printed = capsys.readouterr().out
    assert "segmentation, 1x3x64x64, 1 threads" in printed
    assert "fast int8" in printed
    assert min(Image.open(chart).size) > 100
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Python raises KeyboardInterrupt only if SIGINT was not ignored when it started, as in the background it is."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interruption_keeps_what_is_there(small, tmp_path, capsys, monkeypatch, how: int) -> None:
    passes, ask, before = [], Worker.run, signal.getsignal(signal.SIGTERM)

    def interrupted(self: Worker) -> dict[str, float]:
        passes.append(self)
        if len(passes) == 6:
            signal.raise_signal(how)
        return ask(self)

    monkeypatch.setattr(Worker, "run", interrupted)
    paths = tmp_path / "bench.json", tmp_path / "bench.png"
    command = ["bench", *small, "--precision", "fp32", "--json", str(paths[0]), "--chart", str(paths[1])]
    assert run(command) == 130
    values = json.loads(paths[0].read_text())
    assert values["finished"] is False
    assert [(row["variant"], row["rounds"]) for row in values["rows"]] == [("plain", 2), ("fast fp32", 2)]
    assert "not finished" in capsys.readouterr().out
    assert paths[1].exists()
    assert all(worker._process._closed for worker in passes)
    assert not passes[0]._log.parent.exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_variant_that_fails_is_reported_and_is_the_exit_code(small, tmp_path, capsys, monkeypatch) -> None:
    ask = Worker.run

    def killed(self: Worker) -> dict[str, float]:
        if "fp32" in self._log.name:
            self._process.kill()
        return ask(self)

    monkeypatch.setattr(Worker, "run", killed)
    path = tmp_path / "bench.json"
    assert run(["bench", *small, "--precision", "fp32", "--rounds", "1", "--json", str(path)]) == 1
    rows = {row["variant"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["plain"]["rounds"] == 1
    assert rows["fast fp32"]["error"].startswith("the process was killed")
    assert "FAILED: fast fp32, 1x3x64x64: the process was killed" in capsys.readouterr().out


def test_a_checkpoint(tiny_backbone, tmp_path, capsys) -> None:
    config = VPDConfig(task="referring", tokens=8, base_size=128, backbone=tiny_backbone)
    randomize(VPD.empty(config), 0).save_pretrained(tmp_path / "model")
    common = ["--precision", "", "--peers", "none", "--size", "64", "--rounds", "1"]
    assert run(["bench", "--checkpoint", str(tmp_path / "model"), *common]) == 0
    assert "referring, 1x3x64x64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "100"], "--size must be positive multiples of 64 separated by commas, got '100'"),
        (["--size", "64,0"], "--size must be"),
        (["--batch", "two"], "--batch must be positive integers separated by commas, got 'two'"),
        (["--batch", ""], "--batch must be"),
        (["--precision", "fp8"], "--precision must be some of fp32, bf16, int8, got 'fp8'"),
        (["--peers", "tvm"], "--peers must be all, none,"),
        (["--rounds", "0"], "--rounds"),
        (["--json", "numbers.txt"], "--json must be a file name that ends in .json, got 'numbers.txt'"),
        (["--chart", "/proc/bench.png"], "--chart /proc: cannot write there"),
        (["--task", "detection"], "--task must be one of"),
        (["--checkpoint", "nothing"], "nothing"),
    ],
)
def test_bad_input(options: list[str], message: str, capsys) -> None:
    assert run(["bench", *options]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_a_fast_model_is_not_what_it_can_be_made_of(tiny_backbone, tmp_path: Path, capsys) -> None:
    config = VPDConfig(num_classes=3, channels=32, base_size=128, backbone=tiny_backbone)
    vpd_fast.optimize(randomize(VPD.empty(config), 0).eval(), "int8").save(tmp_path / "engine")
    assert run(["bench", "--checkpoint", str(tmp_path / "engine")]) == 2
    assert "is a fast model; give the weights it was made from" in capsys.readouterr().err
