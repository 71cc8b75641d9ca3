"""benchmarks/gpu.sh: its commands exist and take their arguments, and it keeps account of what ran."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vpd_fast.cli.main import run

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "benchmarks" / "results" / "amd-epyc-avx512-bf16" / "layers.json"
# Stands for Python: says yes to every question, notes what it is to run, and fails for what is in $FAILING.
PYTHON = """#!/usr/bin/env bash
case "$*" in
"-c "*) exit 0 ;;
esac
echo "$*" >>"$LOG"
folder=$VPD_FAST_RESULTS/gpu
[[ "$*" == *layers.py* ]] && mkdir -p "$folder" && echo '{"kind": "cuda"}' >"$folder/layers.json"
[[ -n "$FAILING" && "$*" == *"$FAILING"* ]] && exit 3
exit 0
"""


def call(tmp_path: Path, *parts: str, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *parts]
    variables = os.environ | {"OUT": str(tmp_path / "out"), "PYTHON": sys.executable} | environment
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables)


@pytest.fixture
def commands(tmp_path) -> dict[str, list[str]]:
    """What it would run, by part, without the limit of time and the environment."""
    done = call(tmp_path, "all", GPU_SH_DRY="1", LIMIT="77")
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        name, _, text = line.partition(": ")
        words = shlex.split(text)
        if words[0] == "timeout":
            assert words[:6] == ["timeout", "-s", "INT", "-k", "20", "77"]
            found[name] = words[6:]
    assert not (tmp_path / "out" / "summary.json").exists()
    return found


def after(words: list[str], word: str) -> list[str]:
    return words[words.index(word) + 1 :]


def test_all_parts(commands: dict[str, list[str]]) -> None:
    assert list(commands) == [
        *(
            "tests",
            "tune",
            "measure",
            "ops",
            "e2e-batch1",
            "e2e-batch8",
            "layers",
            "roofline-batch1",
            "roofline-batch8",
        ),
        *("slow", "sanitizer-memcheck", "sanitizer-racecheck", "sanitizer-synccheck", "train-batch1", "train-batch16"),
    ]
    assert all(sys.executable in words for words in commands.values())


def test_scripts_take_their_arguments(commands, script, monkeypatch) -> None:
    """All the way to the question whether there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("layers", "train-batch1", "train-batch16"):
        path, *arguments = after(commands[name], sys.executable)
        with pytest.raises(SystemExit, match="PyTorch finds no NVIDIA GPU here"):
            script(Path(path).stem).main(arguments)


def test_bench_takes_its_arguments(commands, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("e2e-batch1", "e2e-batch8"):
        module, package, *arguments = after(commands[name], sys.executable)
        assert (module, package) == ("-m", "vpd_fast")
        assert run(arguments) == 2
        assert "--device cuda: PyTorch finds no NVIDIA GPU here" in capsys.readouterr().err


def test_the_roofline_takes_the_file_of_the_layers(commands, script, tmp_path) -> None:
    path, *arguments = after(commands["roofline-batch8"], sys.executable)
    assert path == "benchmarks/roofline.py"
    arguments = [str(MEASURED) if word.endswith("DEVICE/layers.json") else word for word in arguments]
    script("roofline").main([*arguments, "--precision", "bf16", "--size", "64"])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"roofline_batch8.json", "roofline_batch8.png"}


def test_measure_takes_its_arguments(commands, script, capsys) -> None:
    path, *arguments = after(commands["measure"], sys.executable)
    assert path == "benchmarks/measure.py"
    assert float(after(arguments, "--seconds")[0]) == 57  # ends by itself before it would be ended after 77
    assert script("measure").main([*arguments, "--list"]) == 0
    assert capsys.readouterr().out.startswith("sanity ")


def test_tune_takes_its_arguments(commands) -> None:
    words = commands["tune"]
    assert after(words, sys.executable)[:2] == ["-m", "vpd_fast"]
    assert run([*after(words, "vpd_fast"), "--help"]) == 0
    assert "--seconds" in words
    assert float(after(words, "--seconds")[0]) < 540


@pytest.mark.parametrize(
    "part", ["ops", *(pytest.param(part, marks=pytest.mark.slow) for part in ("slow", "sanitizer-memcheck", "tests"))]
)
def test_pytest_finds_tests(commands, part: str) -> None:
    words = commands[part][commands[part].index(sys.executable) :]
    assert words[1:3] == ["-m", "pytest"]
    if "-n" in words:
        del words[words.index("-n") : words.index("-n") + 2]
    done = subprocess.run([*words, "--collect-only"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:]
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert found
    if part == "sanitizer-memcheck":
        assert len(found) < 100  # each takes a hundred times as long
        assert all("cuda" in line for line in found)


@pytest.fixture
def stub(tmp_path) -> dict[str, str]:
    path = tmp_path / "python"
    path.write_text(PYTHON)
    path.chmod(0o755)
    (tmp_path / "bin").mkdir()
    for name in ("bash", "env", "timeout", "tee", "mkdir", "touch", "rm", "mv", "find", "grep", "sort", "head", "cut",
                 "tail", "dirname"):  # fmt: skip
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))  # no compute-sanitizer among them
    log = str(tmp_path / "log")
    return {"PYTHON": str(path), "LOG": log, "FAILING": "", "PATH": str(tmp_path / "bin")}


def status(tmp_path: Path) -> dict[str, str]:
    parts = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    return {part["part"]: part["status"] for part in parts}


def test_account_of_what_ran(tmp_path, stub: dict[str, str]) -> None:
    skipped = {"sanitizer": "skipped"}
    done = call(tmp_path, **stub | {"FAILING": "bench --in-process --device cuda --batch 8"})
    assert done.returncode == 1
    assert "gpu.sh: failed: e2e-batch8\n" in done.stdout
    assert "== sanitizer: compute-sanitizer is not installed" in done.stdout
    first = status(tmp_path)
    expected = (
        *("tests", "tune", "measure", "ops", "e2e-batch1", "layers", "roofline-batch1", "roofline-batch8", "slow"),
        *("train-batch1", "train-batch16"),
    )
    assert first == dict.fromkeys(expected, "passed") | {"e2e-batch8": "failed(3)"} | skipped
    assert f"--device {tmp_path}/out/gpu/layers.json --batch 8" in Path(stub["LOG"]).read_text()

    Path(stub["LOG"]).unlink()
    done = call(tmp_path, **stub)  # continues
    assert done.returncode == 0
    assert status(tmp_path) == dict.fromkeys(expected, "before") | {"e2e-batch8": "passed"} | skipped
    assert Path(stub["LOG"]).read_text() == (
        "-m vpd_fast\n-m vpd_fast bench --in-process --device cuda --batch 8 --seconds 120 --compile-seconds 120 "
        f"--json {tmp_path}/out/e2e_batch8.json\n"
    )

    done = call(tmp_path, "tune", "ops", **stub | {"FORCE": "1"})
    assert done.returncode == 0
    assert status(tmp_path) == {"tune": "passed", "ops": "passed"}


def test_a_command_that_takes_too_long_has_failed(tmp_path, stub: dict[str, str]) -> None:
    sleeps = f'[[ "$*" == *benchmarks* ]] && exec {shutil.which("sleep")} 60'
    Path(stub["PYTHON"]).write_text(PYTHON.replace('echo "$*" >>"$LOG"', sleeps))
    done = call(tmp_path, "ops", **stub | {"LIMIT": "1"})
    assert done.returncode == 1
    assert status(tmp_path) == {"ops": "failed(124)"}
    assert not (tmp_path / "out" / "ops.done").exists()


def test_unknown_part(tmp_path) -> None:
    done = call(tmp_path, "tests", "everything", GPU_SH_DRY="1")
    assert done.returncode == 2
    assert (
        done.stdout == "usage: benchmarks/gpu.sh [tests|tune|measure|ops|e2e|layers|slow|sanitizer|train|all|try] ...\n"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which everything would run")
def test_without_a_gpu(tmp_path) -> None:
    done = call(tmp_path, "ops")
    assert done.returncode == 1
    assert done.stdout == "gpu.sh: PyTorch finds no NVIDIA GPU here; nothing was run\n"


def test_the_trial_needs_no_gpu(tmp_path, stub: dict[str, str]) -> None:
    path = Path(stub["PYTHON"])
    path.write_text(path.read_text().replace('"-c "*) exit 0', '*is_available*) exit 1 ;;\n"-c "*) exit 0'))
    done = call(tmp_path, "try", **stub)
    assert done.returncode == 0, done.stdout
    assert status(tmp_path) == {"try": "passed"}
    asked = f"-m vpd_fast\nbenchmarks/measure.py --dry --out {tmp_path}/out/try --seconds 520\n"
    assert Path(stub["LOG"]).read_text() == asked
    assert call(tmp_path, "try", "ops", **stub).returncode == 1
