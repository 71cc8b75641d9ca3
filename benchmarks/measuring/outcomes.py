"""A plugin of pytest: keeps tests whose names match a pattern, repeats them, and notes every outcome at once.

What it does is in the environment variable VPD_FAST_OUTCOMES: {"file": where outcomes go, one JSON object a line,
"patterns": regular expressions, of which a name must have one, or none, "repeat": how often}.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

_WANTED: dict[str, Any] = json.loads(os.environ.get("VPD_FAST_OUTCOMES", "{}"))
_REPETITION = "measured_repetition"


@pytest.fixture(name=_REPETITION)
def _repetition(request: pytest.FixtureRequest) -> int:
    """Which repetition it is; nothing depends on it."""
    return request.param


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Repeats every test."""
    if _WANTED.get("repeat", 1) > 1:
        metafunc.fixturenames.append(_REPETITION)
        metafunc.parametrize(_REPETITION, range(_WANTED["repeat"]), indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is not asked for."""
    patterns = _WANTED.get("patterns")
    if patterns:
        left_out = [item for item in items if not any(re.search(pattern, item.nodeid) for pattern in patterns)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Notes the outcome of a test, once; with several workers the process that leads them is told, too."""
    if "file" not in _WANTED or os.environ.get("PYTEST_XDIST_WORKER"):
        return
    if report.when == "call" or report.outcome != "passed":
        outcome = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            outcome["error"] = str(crash.message if crash else report.longrepr)[:400]
        with Path(_WANTED["file"]).open("a") as file:
            file.write(json.dumps(outcome) + "\n")
