"""Who computes when, with stand-ins for the processes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from vpd_fast import VPD, VPDConfig
from vpd_fast.bench import runner
from vpd_fast.bench.in_process import Shared
from vpd_fast.bench.parity import Outputs
from vpd_fast.bench.runner import Bench
from vpd_fast.bench.variants import STAGES, Case, Source
from vpd_fast.bench.worker import WorkerError

GIB = 1 << 30
LARGE, SMALL = Case(128), Case(64)


class Machine:
    """What the stand-ins share: which processes there are, what they did, and when one fails."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.passes: list[str] = []
        self.prepared: list[tuple[str, Case]] = []
        self.most_at_once = 0
        self.fail: dict[str, int] = {}  # the name of a variant, and the number of the pass in which it fails
        self.fail_to_start: set[str] = set()
        self.interrupt_at = -1
        self.peak = GIB

    def make_worker(self, make: object, source: Source, name: str) -> Worker:
        return Worker(self, name)


class Worker:
    """A stand-in for a process."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name = machine, name
        machine.running.append(name)
        machine.most_at_once = max(machine.most_at_once, len(machine.running))

    def wait(self) -> dict[str, int]:
        if self.name in self.machine.fail_to_start:
            raise WorkerError("cannot be made")
        return {"resident": self.machine.peak // 2, "peak": self.machine.peak}

    def prepare(self, case: Case, outputs: Path) -> dict[str, int]:
        self.machine.prepared.append((self.name, case))
        ones = torch.ones(1, 4, 2, 2)
        Outputs(ones, [ones], ones, torch.zeros(1, 2, 2, dtype=torch.long)).save(outputs)
        return {"resident": self.machine.peak // 2, "peak": self.machine.peak}

    def run(self) -> dict[str, float]:
        self.machine.passes.append(self.name)
        if len(self.machine.passes) == self.machine.interrupt_at:
            raise KeyboardInterrupt
        if Counter(self.machine.passes)[self.name] == self.machine.fail.get(self.name):
            raise WorkerError("out of memory")
        return dict.fromkeys(STAGES, 1.0 if self.name == "plain" else 0.5)

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)

    def close(self) -> None:
        self.machine.running.remove(self.name)


@pytest.fixture
def machine(monkeypatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(runner, "Worker", machine.make_worker)
    monkeypatch.setattr(runner, "total_memory", lambda *_: 1000 * GIB)
    return machine


@pytest.fixture
def bench(machine: Machine, tmp_path, tiny_backbone):
    def make(names=("fast fp32", "fast int8"), cases=(SMALL,), rounds=4, seconds=1000.0) -> Bench:
        config = VPDConfig(num_classes=3, base_size=128, backbone=tiny_backbone)
        return Bench(Source(tmp_path, tmp_path, 1), config, names, cases, rounds, seconds)

    return make


def test_variants_take_turns_and_another_goes_first_in_every_round(machine: Machine, bench) -> None:
    bench().run()
    a, b, c = "plain", "fast fp32", "fast int8"
    assert machine.passes == [a, b, c, b, c, a, c, a, b, a, b, c]
    assert machine.running == []


def test_what_is_measured(bench) -> None:
    plain, fp32, int8 = bench().run()
    assert [m.variant for m in (plain, fp32, int8)] == ["plain", "fast fp32", "fast int8"]
    assert len(fp32.seconds) == len(fp32.baseline_seconds) == 4
    assert fp32.baseline_seconds[0]["unet"] == 2 * fp32.seconds[0]["unet"]
    assert fp32.agreement["logits"] == pytest.approx(1)
    assert plain.agreement is None
    assert fp32.memory == {"run": GIB, "build": GIB}
    assert int8.memory == {"run": GIB, "build": GIB, "loaded": GIB}
    assert not any(m.error for m in (plain, fp32, int8))


def test_measurements_are_handed_over_when_they_are_complete(machine: Machine, bench, monkeypatch) -> None:
    """Two groups: with room for two processes and a pass."""
    monkeypatch.setattr(runner, "total_memory", lambda *_: 5 * GIB // 2)
    machine.fail_to_start = {"fast bf16"}
    run, reported = bench(names=["fast fp32", "fast bf16", "fast int8"], cases=[SMALL, LARGE], rounds=3), []
    run.on_measured = lambda m: reported.append((m.variant, m.case, len(m.seconds), len(machine.passes)))
    run.run()
    bf16 = [("fast bf16", case, 0) for case in (SMALL, LARGE)]
    assert [entry[:3] for entry in reported] == [
        *(("plain", SMALL, 3), ("fast fp32", SMALL, 3), ("plain", LARGE, 3), ("fast fp32", LARGE, 3)),
        *(*bf16, ("fast int8", SMALL, 3), ("fast int8", LARGE, 3)),
    ]
    assert [entry[3] for entry in reported] == [6, 6, 12, 12, 12, 12, 18, 24]


def test_in_one_process_variants_come_one_by_one(machine: Machine, bench, monkeypatch, tmp_path) -> None:
    """So that a row is there before the next variant is made."""

    class Turn(Worker):
        def __init__(self, make: object, source: Source, name: str) -> None:
            super().__init__(machine, name)

    monkeypatch.setattr(runner, "Turn", Turn)
    run = bench()
    run.source = Shared(VPD.empty(run.config), tmp_path, 1)
    events: list[str] = []
    run.on_step = lambda text, _: events.append(text) if text.endswith("starting") else None
    run.on_measured = lambda m: events.append(m.variant)
    run.run()
    a, b, c = "plain", "fast fp32", "fast int8"
    assert events == [f"{a}: starting", f"{b}: starting", a, b, f"{c}: starting", c]
    assert machine.passes == [a, b, b, a, a, b, b, a, a, c, c, a, a, c, c, a]


def test_time_is_up_after_three_rounds(machine: Machine, bench) -> None:
    bench(seconds=0.0).run()
    assert Counter(machine.passes) == {"plain": 3, "fast fp32": 3, "fast int8": 3}


def test_several_cases_with_the_largest_prepared_first(machine: Machine, bench) -> None:
    run = bench(names=["fast fp32"], cases=[SMALL, LARGE])
    run.run()
    assert [(m.case, m.variant) for m in run.ordered()] == [
        (SMALL, "plain"), (SMALL, "fast fp32"), (LARGE, "plain"), (LARGE, "fast fp32")
    ]  # fmt: skip
    assert machine.prepared[0] == ("plain", LARGE)  # so that the memory it needs is known


def test_what_has_no_room_waits_and_meets_the_baseline_later(machine: Machine, bench, monkeypatch) -> None:
    monkeypatch.setattr(runner, "total_memory", lambda *_: 5 * GIB // 2)  # two processes and a pass
    names = ["fast fp32", "fast bf16", "fast int8"]
    run = bench(names=names)
    run.run()
    assert machine.most_at_once == 3  # two, and the saved model in passing
    assert Counter(machine.passes) == {"plain": 12, **dict.fromkeys(names, 4)}
    found = {m.variant: m for m in run.measurements}
    assert len(found["plain"].seconds) == 12
    assert all(len(found[name].baseline_seconds) == 4 for name in names)


def test_without_room_for_probabilities_the_baseline_does_not_store_them(bench, monkeypatch) -> None:
    run = bench()
    assert run.baseline_of(Case(1024)) == "plain"
    needed = 2 * 4 * run.config.backbone.num_heads * (1024 // 8) ** 4  # two copies of heads x N x N in float32
    monkeypatch.setattr(runner, "total_memory", lambda *_: needed)
    assert run.baseline_of(Case(1024)) == "sdpa"
    assert run.baseline_of(Case(512)) == "plain"
    assert run.baseline_of(Case(512, batch=16)) == "sdpa"


def test_a_failure_does_not_stop_the_others(machine: Machine, bench) -> None:
    machine.fail = {"fast fp32": 3}
    run = bench(cases=[SMALL, LARGE])
    run.run()
    found = {(m.case, m.variant): m for m in run.measurements}
    first = found[SMALL, "fast fp32"]
    assert (first.error, len(first.seconds), len(first.baseline_seconds)) == ("out of memory", 2, 2)
    later = found[LARGE, "fast fp32"]
    assert (later.error, later.seconds) == ("out of memory", [])
    assert len(found[LARGE, "fast int8"].seconds) == 4
    assert machine.running == []


def test_what_cannot_be_made_is_said(machine: Machine, bench) -> None:
    machine.fail_to_start = {"fast fp32"}
    found = {m.variant: m for m in bench().run()}
    assert found["fast fp32"].error == "cannot be made"
    assert len(found["fast int8"].seconds) == 4


def test_without_a_baseline_there_are_times_only(machine: Machine, bench) -> None:
    machine.fail_to_start = {"plain"}
    found = {m.variant: m for m in bench().run()}
    assert found["plain"].error == "cannot be made"
    assert len(found["fast fp32"].seconds) == 4
    assert found["fast fp32"].baseline_seconds == []
    assert (found["fast fp32"].baseline, found["fast fp32"].agreement) == (None, None)


def test_an_interruption_leaves_complete_rounds_and_no_process(machine: Machine, bench) -> None:
    machine.interrupt_at = 8
    run = bench()
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert [len(m.seconds) for m in run.measurements] == [2, 2, 2]
    assert machine.running == []
