"""The plan for very many images is what a simulation of queues and batches finds."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("simpy")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scale_simulation.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale_simulation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("limit", "device_ms", "cores", "gigabits"),
    [("processors", 2, 2, 10), ("device", 2, 8, 10), ("device", 8, 2, 10), ("network", 2, 8, 0.4)],
)
def test_simulation_and_plan_agree(script, limit, device_ms, cores, gigabits) -> None:
    machine = script.Machine(3.6, 2.8, device_ms, cores, 200, gigabits)
    assert machine.pace()[0] == limit
    assert script.simulate(machine, 1000) == pytest.approx(machine.pace()[1], rel=0.05)


def test_many_files_are_what_storage_opens(script) -> None:
    machine = script.Machine(3.6, 2.8, 2, 8, 200, 10, files=2, files_per_second=500)
    assert machine.pace() == ("storage", 250)
    assert script.simulate(machine, 1000) == pytest.approx(250, rel=0.05)


def test_queues_without_room_are_what_the_plan_does_not_see(script) -> None:
    """So the simulation can contradict the plan: here processors and device wait for each other."""
    machine = script.Machine(1.0, 1.0, 2.0, 1, 200, ahead=1)
    assert script.simulate(machine, 1000) < 0.85 * machine.pace()[1]


def test_measured_stages_are_those_of_the_overlay(script, tmp_path) -> None:
    stages = {"read": 2.0, "resize": 1.0, "write labels": 1.0, "draw": 4.0, "write overlay": 3.0, "record": 1.0}
    runs = [{"overlay": "none", "core_ms": 10.0}, {"overlay": "jpg", "core_ms": 12.0}]
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"stages_core_ms": stages, "runs": runs}))
    machine = script.measured(path, "none", 2.0, 4, kilobytes=200)
    assert (machine.read_ms, machine.write_ms) == pytest.approx((6.0, 4.0))
    machine = script.measured(path, "jpg", 2.0, 4, kilobytes=200)
    assert (machine.read_ms, machine.write_ms) == pytest.approx((3.0, 9.0))
