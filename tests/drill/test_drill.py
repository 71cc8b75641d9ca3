"""Every damaged file is refused by one clear error or loaded, within limits of time and memory.

`pytest tests/drill --drill 3000` tries more. A number of a failure is its seed: `python -m tests.drill.worker FOLDER
NUMBER 1` repeats it.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ..helpers import processes
from . import worker

COUNT = 50
AT_ONCE = 500  # files that a process tries


def tried(folder: Path, first: int, count: int) -> list[dict[str, Any]]:
    """What became of files number `first` and following, in a process that ends at the first that it cannot survive."""
    log = folder / f"log-{first}"
    process = processes.start(worker.main, folder, first, count, log=log)
    process.join()
    printed = log.read_text(errors="replace")
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"number"')]
    results = [line for line in lines if "outcome" in line]
    if process.exitcode:
        assert lines, printed[-2000:]
        problem = f"the process ended with {process.exitcode}: {printed[-1000:]}"
        results.append({"number": lines[-1]["number"], "outcome": "failed", "problem": problem})
        rest = first + count - 1 - results[-1]["number"]
        return results + (tried(folder, first + count - rest, rest) if rest else [])
    return results


@pytest.mark.drill
def test_damaged_files(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    count = request.config.getoption("--drill", default=None) or COUNT
    results: list[dict[str, Any]] = []
    for first in range(0, count, AT_ONCE):
        results += tried(tmp_path, first, min(AT_ONCE, count - first))
    assert [line["number"] for line in results] == list(range(count))
    outcomes = Counter(line["outcome"] for line in results)
    slowest, largest = (max(results, key=lambda line, name=name: line.get(name, 0)) for name in ("seconds", "bytes"))
    print(f"{count} files: {dict(outcomes)}; the slowest {slowest}; the largest {largest}")
    problems = [line for line in results if line["problem"]]
    assert not problems, "\n".join(map(str, problems[:20]))
    assert outcomes.keys() == {"accepted", "refused"}, outcomes  # both happen, or the damage is none or too much
