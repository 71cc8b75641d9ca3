"""Every damaged file is refused by one clear error or loaded, within limits of time and memory.

`pytest tests/drill --drill 3000` tries more. A number of a failure is its seed: `worker.py FOLDER NUMBER 1` repeats it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

COUNT = 150
WORKER = Path(__file__).with_name("worker.py")


@pytest.mark.drill
def test_damaged_files(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    count = request.config.getoption("--drill", default=None) or COUNT
    command = [sys.executable, str(WORKER), str(tmp_path), "0", str(count)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"the process ended with {done.returncode} at {lines[-1:]}: {done.stderr[-2000:]}"
    results = [line for line in lines if "outcome" in line]
    assert len(results) == count
    problems = [line for line in results if line["problem"]]
    assert not problems, "\n".join(map(str, problems[:20]))
    outcomes = {line["outcome"] for line in results}
    assert outcomes == {"accepted", "refused"}, outcomes  # both happen, or the damage is none or too much
