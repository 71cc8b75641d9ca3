"""Memory stays flat over thousands of predictions: whatever is kept of an image is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

COUNT, WARM = 5000, 1000  # in the first thousand caches fill, and the C library's memory is cut into pieces
PAGE = 4096  # bytes: the result of the smallest image takes more


@pytest.mark.drill
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["plain", "int8"])
def test_memory_is_flat(precision: str, tmp_path: Path) -> None:
    """It grows by less than a page for each prediction: labels and pictures of 40x96 pixels have 4 kB to 40 kB."""
    program = Path(__file__).with_name("predictions.py")
    command = [sys.executable, str(program), str(tmp_path), str(COUNT), str(WARM), precision]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    print(found)
    assert (found["done"], found["failed"]) == (COUNT, 0)
    assert found["end"] - found["warm"] < PAGE * (COUNT - WARM), found
