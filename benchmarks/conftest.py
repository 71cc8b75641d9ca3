"""Makes the helpers beside this file importable, and keeps the rows that the suites measured."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from vpd_fast.bench import timing

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
_ROWS: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every benchmark runs on the CPU, and on the GPU where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return request.param


@pytest.fixture
def keep(request: pytest.FixtureRequest, device: str) -> Callable[[list[dict[str, Any]]], None]:
    """keep(rows): adds rows to the results of this suite, which are written and printed at the end."""
    suite = request.path.stem.removeprefix("test_")
    return _ROWS[suite, device].extend


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Writes each suite's rows and prints them as a table."""
    for (suite, device), rows in _ROWS.items():
        if rows:
            path = timing.write_rows(suite, device, rows)
            terminalreporter.section(f"{suite} on {timing.device_name(device)}: {path}")
            terminalreporter.write_line(timing.table(rows))
    return (yield)
