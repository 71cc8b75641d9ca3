"""`pytest benchmarks/` on made-up measurements: a regression fails, noise does not, and a new machine passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vpd_fast.bench.environment import kind_of_machine
from vpd_fast.bench.regression import NOISE, StoredRatios, gated

pytest_plugins = ["pytester"]
CONFTEST = Path(__file__).parents[2] / "benchmarks" / "conftest.py"
SUITE = """
import json
import pathlib
import pytest

@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_side_by_side(keep):
    keep(json.loads(pathlib.Path(__file__).with_name("rows.json").read_text()))

@pytest.mark.exhaustive
def test_much():
    raise AssertionError("not among the typical cases")
"""
WORDS = {"case": "64x64", "threads": 2, "rounds": 9}
BASELINE = WORDS | {"variant": "eager", "over": "eager", "speedup": 1.0, "over_sdpa": 0.5, "p50_ms": 8.0}
KERNEL = WORDS | {"variant": "cpu avx2", "over": "eager", "speedup": 4.0, "over_sdpa": 2.0, "p50_ms": 2.0}
ROWS = [BASELINE, BASELINE | {"variant": "sdpa", "speedup": 2.0}, KERNEL]


@pytest.fixture
def benchmarks(pytester: pytest.Pytester, tmp_path) -> Callable[..., tuple[int, str]]:
    """Runs a suite that measured these rows, with our conftest and a folder of ratios: exit code, printed text."""
    (pytester.path / "test_example.py").write_text(SUITE)
    (pytester.path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu:\n    slow:\n")
    shutil.copy(CONFTEST, pytester.path)

    def run(rows: list[dict], *options: str) -> tuple[int, str]:
        (pytester.path / "rows.json").write_text(json.dumps(rows))
        done = pytester.runpytest_inprocess("-q", f"--ratios={tmp_path / 'ratios'}", *options)
        return done.ret, done.stdout.str()

    return run


def test_a_regression_fails_and_noise_does_not(benchmarks, tmp_path) -> None:
    code, printed = benchmarks(ROWS)
    assert (code, "no ratios are stored for this kind of machine" in printed) == (0, True), printed
    assert benchmarks(ROWS, "--store-ratios")[0] == 0
    path = tmp_path / "ratios" / kind_of_machine("cpu") / "regression.json"
    (stored,) = json.loads(path.read_text())["rows"]  # of what is ours
    assert stored == {
        "suite": "example",
        "case": "64x64",
        "threads": 2,
        "variant": "cpu avx2",
        "speedup": 4.0,
        "over_sdpa": 2.0,
        "p50_ms": 2.0,
    }

    noisy = KERNEL | {"speedup": 4.0 * (1 - NOISE) + 0.01, "over_sdpa": 0.1, "p50_ms": 90.0, "rounds": 3}
    code, printed = benchmarks([*ROWS[:2], noisy])
    assert code == 0
    assert "1 of 1 rows compared" in printed
    slower = KERNEL | {"speedup": 4.0 * (1 - NOISE) - 0.01, "over_sdpa": 1.4}
    assert benchmarks([*ROWS[:2], slower])[0] == 0  # its own time is the same: the others have become faster
    slower["p50_ms"] = 2.0 / (1 - NOISE) + 0.01
    code, printed = benchmarks([*ROWS[:2], slower])
    assert code == 1
    assert "SLOWER: example, 64x64, 2, cpu avx2: speedup was 4.0, now 2.99, over_sdpa was 2.0, now 1.4" in printed


def test_nothing_is_stored_of_a_run_that_failed(benchmarks, tmp_path) -> None:
    code, printed = benchmarks(ROWS, "--store-ratios", "-m", "exhaustive or not exhaustive")
    assert code == 1
    assert "not among the typical cases" in printed
    assert not (tmp_path / "ratios").exists()


def test_what_is_compared(tmp_path) -> None:
    stored = StoredRatios(tmp_path, "a-cpu")
    stored.store(gated("linear", ROWS), "cpu")
    other = [KERNEL | {"threads": 1, "speedup": 0.1}, KERNEL | {"case": "new", "speedup": 0.1}]
    assert stored.slower(gated("linear", other)) == ([], 0)
    assert stored.slower(gated("conv2d", [KERNEL | {"speedup": 0.1}])) == ([], 0)
    assert stored.slower(gated("linear", [KERNEL | {"speedup": 0.1, "over_sdpa": 0.1}]))[1] == 1
    assert gated("engine", [WORDS | {"variant": "fp32", "over": "plain", "speedup": 3.0, "p50_ms": 1.0}]) == [
        {"suite": "engine", "case": "64x64", "threads": 2, "variant": "fp32", "speedup": 3.0, "p50_ms": 1.0}
    ]
