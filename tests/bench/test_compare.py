"""benchmarks/compare.py: which changes of a result file are regressions."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compare.py"
OPERATOR = {"case": "64x64", "dtype": "float32", "threads": 2, "over": "pytorch", "rounds": 9, "p50_ms": 2.5}
FIRST = OPERATOR | {"variant": "cpu avx2", "speedup": 2.0, "gb_per_s": 3.1}
SECOND = OPERATOR | {"variant": "cpu avx512", "speedup": 4.0, "over_sdpa": 1.5}
ENGINE = {
    "case": "1x3x512x512",
    "task": "segmentation",
    "variant": "fast int8",
    "threads": 2,
    "parity": "passed",
    "over": "plain",
    "speedup": 9.0,
    "backbone_speedup": 8.5,
    "stages_ms": {"encoder": 1.0},
}


@pytest.fixture
def compare(script) -> Callable:
    return script("compare").main


@pytest.fixture
def files(tmp_path) -> Callable[..., list[str]]:
    def write(*contents: Any) -> list[str]:
        paths = []
        for i, rows in enumerate(contents):
            path = tmp_path / f"{i}.json"
            path.write_text(rows if isinstance(rows, str) else json.dumps({"environment": {}, "rows": rows}))
            paths.append(str(path))
        return paths

    return write


@pytest.mark.parametrize(
    "new",
    [
        [FIRST, SECOND, ENGINE],
        [ENGINE, SECOND, FIRST],
        [FIRST | {"speedup": 1.81, "p50_ms": 9.9, "rounds": 3, "gb_per_s": 0.1}, SECOND | {"speedup": 40.0}, ENGINE],
        [FIRST, SECOND, ENGINE, FIRST | {"variant": "new", "speedup": 0.1}],
    ],
    ids=["same", "another order", "slower machine, ratios within 10 %", "a new row"],
)
def test_no_regression(compare, files, new, capsys) -> None:
    assert compare(files([FIRST, SECOND, ENGINE], new)) == 0
    assert capsys.readouterr().out == "no regression: 5 ratios within 10%\n"


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ([FIRST | {"speedup": 1.79}, SECOND, ENGINE], "64x64, float32, 2, cpu avx2: speedup was 2.0, now 1.79\n"),
        ([FIRST, SECOND | {"over_sdpa": 1.0}, ENGINE], "64x64, float32, 2, cpu avx512: over_sdpa was 1.5, now 1.0\n"),
        ([FIRST, SECOND, ENGINE | {"backbone_speedup": 7.0}], "backbone_speedup was 8.5, now 7.0\n"),
        ([FIRST | {"speedup": 1.0}, SECOND | {"speedup": 1.0}, ENGINE], "speedup was 2.0, now 1.0 (and 1 more)\n"),
        ([SECOND, ENGINE], "64x64, float32, 2, cpu avx2: not measured any more\n"),
        ([FIRST | {"threads": 1}, SECOND, ENGINE], "64x64, float32, 2, cpu avx2: not measured any more\n"),
        (
            [FIRST, SECOND, {k: v for k, v in ENGINE.items() if "speedup" not in k} | {"parity": "failed"}],
            "fast int8: speedup was 9.0, now there is none (parity failed) (and 1 more)\n",
        ),
        (
            [FIRST, SECOND, {k: ENGINE[k] for k in ("case", "task", "variant", "threads")} | {"error": "no memory"}],
            "fast int8: speedup was 9.0, now there is none (no memory) (and 1 more)\n",
        ),
    ],
)
def test_the_first_regression_is_named(compare, files, new, message: str, capsys) -> None:
    assert compare(files([FIRST, SECOND, ENGINE], new)) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("regression: ")
    assert printed.endswith(message)


def test_tolerance(compare, files) -> None:
    paths = files([FIRST], [FIRST | {"speedup": 1.7}])
    assert compare([*paths, "--tolerance", "0.2"]) == 0
    assert compare([*paths, "--tolerance", "0.1"]) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "is no result file: JSONDecodeError"),
        ("[]", "is no result file: TypeError"),
        ("{}", "is no result file: KeyError"),
        ([FIRST, FIRST], "has rows that cannot be told apart"),
    ],
)
def test_files_that_cannot_be_compared(compare, files, content, message: str, capsys) -> None:
    for paths in (files([FIRST], content), files(content, [FIRST])):
        with pytest.raises(SystemExit) as stopped:
            compare(paths)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_as_a_program(files) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *files([FIRST], [])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == "regression: 64x64, float32, 2, cpu avx2: not measured any more\n"
    assert not done.stderr


def test_stored_results_are_comparable(compare) -> None:
    """Every file that the suites wrote has rows with keys of their own."""
    stored = sorted((SCRIPT.parent / "results").rglob("*.json"))
    assert stored
    for path in stored:
        assert compare([str(path), str(path)]) == 0, path
