"""Tests on the GPU, each selection in a process that may die: a few for sanity, and those that once failed."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring.plan import Row, Step
from measuring.setting import STAND_IN, Setting

ROOT = Path(__file__).parents[2]
FATAL, MAX_PRINTED = "Fatal Python error", 800  # what begins the report of a death, and characters of it
MAX_FAILURES = 40  # of a selection, that get a row


@dataclass(frozen=True)
class Selection:
    """Tests to run.

    arguments: of pytest. patterns: regular expressions, of which a test's name must have one, if there are some.
    repeat: times each is run. seconds: that all may take.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float
    patterns: tuple[str, ...] = ()
    repeat: int = 1


SANITY = Selection(
    "bitwise products and operators",
    ("tests/native/test_cuda_gemm.py", "tests/ops/test_products_gpu.py", "-m", "gpu"),
    20,
    (
        r"test_(sizes|geometry|the_largest_sums_of_8_bits)\[gpu-.*wgmma",
        r"test_statistics_and_repetition",
    ),
)
SUSPECTS = (  # that failed on an H200, and why is not settled
    Selection(
        "small fp32 engine with graphs, alone",
        ("tests/engine/test_gpu.py", "-m", "gpu"),
        30,
        (r"test_agrees_with_the_plain_model\[fp32\]",),
    ),
    Selection(
        "maps in one pass over rows of odd length",
        ("tests/kernels/test_cross_attention_maps.py", "-m", "gpu"),
        30,
        (r"test_shapes\[.*\(40, 77, 70, 3, torch\.bfloat16, 2\)",),
        repeat=20,
    ),
    Selection("all tests of operators", ("tests/ops", "-m", "gpu", "--maxfail", "40", "-n", "8"), 60),
)
STAND_IN_TESTS = "def test_one(): pass\ndef test_two(): assert 1 + 1 == 3\n"


def sanity(setting: Setting) -> Iterator[Step]:
    """One step: whether results are right at all."""
    yield Step(SANITY.name, functools.partial(_run, setting, SANITY), SANITY.seconds + 5)


def suspects(setting: Setting) -> Iterator[Step]:
    """A step for each selection."""
    for selection in setting.only(list(SUSPECTS)):
        yield Step(selection.name, functools.partial(_run, setting, selection), selection.seconds + 5)


def _run(setting: Setting, selection: Selection) -> list[Row]:
    if not setting.dry:
        return run(selection)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_stand_in.py").write_text(STAND_IN_TESTS)
        stand_in = Selection(selection.name, ("--rootdir", folder, "-c", os.devnull, folder), selection.seconds)
        return [{**row, STAND_IN: "two tests that need nothing, one of which fails"} for row in run(stand_in)]


def run(selection: Selection) -> list[Row]:
    """A row of numbers, and one for each test that failed."""
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder, "outcomes"), Path(folder, "log")
        file.touch()
        wanted = {"file": str(file), "patterns": selection.patterns, "repeat": selection.repeat}
        paths = [str(ROOT / "benchmarks"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "VPD_FAST_OUTCOMES": json.dumps(wanted)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "measuring.outcomes", "-p", "no:cacheprovider"]
        start = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                [*command, *selection.arguments],
                cwd=ROOT, env=_environment() | environment, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
            ended = _wait(process, selection.seconds)
        outcomes = [json.loads(line) for line in file.read_text().splitlines()]
        return _rows(selection, outcomes, ended, time.monotonic() - start, log.read_text(errors="replace"))


def _environment() -> dict[str, str]:
    """That of a process that nobody tests: without what pytest says to those within one."""
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}


def _wait(process: subprocess.Popen, seconds: float) -> str:
    """How the process ended: "" as pytest does, else in words. It and its children are gone after this."""
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        return f"ended after {seconds:.0f} s"
    return "" if code in (0, 1) else f"exit code {code}"


def _rows(selection: Selection, outcomes: list[dict[str, Any]], ended: str, seconds: float, log: str) -> list[Row]:
    counts = Counter(outcome["outcome"] for outcome in outcomes)
    row: Row = {"tests": selection.name, **{name: counts[name] for name in ("passed", "failed", "skipped")}}
    row |= {"seconds": round(seconds, 1)}
    if ended:  # pytest has faulthandler on, which says where
        at = log.find(FATAL)
        printed = log[at : at + MAX_PRINTED] if at >= 0 else log.strip()[-MAX_PRINTED:]
        row |= {"ended": ended, "last": outcomes[-1]["test"] if outcomes else "", "printed": printed}
    failed = [outcome for outcome in outcomes if outcome["outcome"] == "failed"]
    return [row, *({"failed": o["test"], "error": o.get("error", "")} for o in failed[:MAX_FAILURES])]
