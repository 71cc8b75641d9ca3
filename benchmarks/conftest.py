"""Chooses what is measured, keeps the rows that the suites measured, and compares their ratios with stored ones.

    pytest benchmarks/                                   typical cases, in minutes; fails if one has become slower
    pytest benchmarks/ --store-ratios                    stores the ratios that later runs are compared with
    VPD_FAST_RESULTS=FOLDER pytest benchmarks/ -m MARKS  writes tables, too; with -m nothing is left out but by it

Ratios are stored for each kind of machine (name of the CPU and its instruction set, or of the GPU).
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vpd_fast.bench import timing
from vpd_fast.bench.environment import device_name, kind_of_machine
from vpd_fast.bench.regression import NOISE, StoredRatios, gated

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
_ROWS: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)  # by suite and device
_VERDICTS: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options for stored ratios."""
    folder = Path(__file__).parent / "results"
    parser.addoption("--store-ratios", action="store_true", help="store the ratios of this run, if all of it passed")
    parser.addoption("--ratios", metavar="FOLDER", type=Path, default=folder, help="of stored ratios (default: ours)")


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker of these suites."""
    config.addinivalue_line("markers", "exhaustive: not among the typical cases that run without -m")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without -m, and unless a test is named, leaves the exhaustive and slow cases out."""
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive") or item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every benchmark runs on the CPU, and on the GPU where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return request.param


@pytest.fixture
def keep(request: pytest.FixtureRequest, device: str) -> Callable[[list[dict[str, Any]]], None]:
    """keep(rows): adds rows to the results of this suite, which are compared and printed at the end."""
    suite = request.path.stem.removeprefix("test_")
    return _ROWS[suite, device].extend


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Stores the ratios or compares them; the run fails if something has become slower."""
    for device in dict.fromkeys(device for _, device in _ROWS):
        stored = StoredRatios(session.config.option.ratios, kind_of_machine(device))
        rows = [row for (suite, of), kept in _ROWS.items() if of == device for row in gated(suite, kept)]
        if session.config.option.store_ratios:
            if exitstatus:
                _VERDICTS.append(f"nothing stored in {stored.path}: not everything passed")
                continue
            stored.store(rows, device)
            _VERDICTS.append(f"{len(rows)} rows of ratios stored in {stored.path}")
        elif not stored.path.is_file():
            _VERDICTS.append(f"not compared: no ratios are stored for this kind of machine ({stored.path})")
        else:
            lines, compared = stored.slower(rows)
            _VERDICTS.append(f"{compared} of {len(rows)} rows compared with {stored.path}, noise {NOISE:.0%}")
            _VERDICTS.extend(f"SLOWER: {line}" for line in lines)
            if lines and not exitstatus:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Prints each suite's rows as a table, writes them if VPD_FAST_RESULTS names a folder, and says what got slower."""
    for (suite, device), rows in _ROWS.items():
        if rows:
            path = f": {timing.write_rows(suite, device, rows)}" if "VPD_FAST_RESULTS" in os.environ else ""
            terminalreporter.section(f"{suite} on {device_name(device)}{path}")
            terminalreporter.write_line(timing.table(rows))
    if _VERDICTS:
        terminalreporter.section("speed-ups")
        for line in _VERDICTS:
            terminalreporter.write_line(line, red=line.startswith("SLOWER"))
    return (yield)
