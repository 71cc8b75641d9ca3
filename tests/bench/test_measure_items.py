"""The items of benchmarks/measure.py: every one of them in a dry run, and the tests that two of them select."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ITEMS = (
    *("sanity", "passes", "products", "memory", "rates", "contention", "halo", "launches", "peers", "attention"),
    *("preparation", "labels", "narrow", "static_rows", "tests", "layers", "libraries"),
)
MAX_SECONDS = 540  # of a whole run


def test_a_dry_run_runs_every_item(script, tmp_path, capsys) -> None:
    assert script("measure").main(["--dry", "--out", str(tmp_path)]) == 0, (tmp_path / "measure.log").read_text()[
        -3000:
    ]
    content = json.loads((tmp_path / "measure.json").read_text())
    assert content["facts"]["dry"]
    assert {name: item["status"] for name, item in content["items"].items()} == dict.fromkeys(ITEMS, "done")
    rows = {name: [r for s in item["steps"].values() for r in s["rows"]] for name, item in content["items"].items()}
    assert all(rows.values())
    partly = {name for name, found in rows.items() if any("not run" in row for row in found)}
    assert partly == {"attention", "labels", "narrow", "products"}
    for name in ("sanity", "tests", "memory", "rates", "contention", "halo", "launches"):
        assert all(row["stand_in"] for row in rows[name])
    assert all(row["cosine"] > 0.99 for row in (*rows["passes"], *rows["static_rows"]))
    assert {row["variant"] for row in rows["products"] if "variant" in row} >= {"cuda", "triton"}  # library: no int8
    printed = capsys.readouterr().out
    assert printed.index("== sanity") < printed.index("== passes") < printed.index("== libraries")


def test_caps_add_up_to_less_than_nine_minutes(script) -> None:
    items = script("measuring.items").PLAN.items
    assert tuple(item.name for item in items) == ITEMS
    assert sum(item.seconds for item in items) <= MAX_SECONDS


def test_unknown_items(script) -> None:
    with pytest.raises(SystemExit, match="unknown items nonsense; known are sanity, passes"):
        script("measure").main(["--items", "sanity", "nonsense", "--list"])


def test_selected_tests_exist(script) -> None:
    """Every pattern of every selection finds tests of the GPU."""
    module = script("measuring.tests")
    selections = (module.SANITY, *module.SUSPECTS)
    files = sorted({word for selection in selections for word in selection.arguments if word.endswith(".py")})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    names = [line for line in done.stdout.splitlines() if "::" in line]
    patterns = [pattern for selection in selections for pattern in selection.patterns]
    assert {p: any(re.search(p, name) for name in names) for p in patterns} == dict.fromkeys(patterns, True)
    sanity = [name for name in names if any(re.search(pattern, name) for pattern in module.SANITY.patterns)]
    assert 50 <= len(sanity) <= 120


def test_outcomes_of_tests_that_fail_repeat_die_and_hang(script, tmp_path) -> None:
    module = script("measuring.tests")
    (tmp_path / "test_some.py").write_text(
        "import os, time, pytest\n"
        "@pytest.mark.parametrize('x', ['good', 'bad'])\n"
        "def test_fails(x): assert x == 'good', 'it is bad'\n"
        "def test_other(): raise ValueError\n"
        "def test_dies(): os.abort()\n"
        "def test_hangs(): time.sleep(60)\n"
    )
    arguments = ("--rootdir", str(tmp_path), "-c", os.devnull, str(tmp_path))

    def run(pattern: str, repeat: int = 1, seconds: float = 20.0) -> list[dict]:
        return module.run(module.Selection("some", arguments, seconds, (pattern,), repeat))

    (counts, failure) = run(r"test_fails.*bad", 3)[:2]
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (0, 3, 0)
    assert failure["error"].startswith("AssertionError: it is bad")
    (died,) = run("test_dies")
    assert died["ended"] == "exit code -6"
    assert "Fatal Python error: Aborted" in died["printed"]
    (hung,) = run("test_(hangs|nothing)", seconds=3.0)
    assert hung["ended"] == "ended after 3 s"
