"""The schedule of a benchmark: processes of all variants, as many as memory allows, taking turns round by round."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from vpd_fast.bench.catalog import BASELINES, ENTRIES
from vpd_fast.bench.environment import total_memory
from vpd_fast.bench.in_process import Shared, Turn
from vpd_fast.bench.parity import Outputs, agreement
from vpd_fast.bench.variants import Case, Source, make_loaded, plain_bytes
from vpd_fast.bench.worker import Worker, WorkerError
from vpd_fast.config import VPDConfig
from vpd_fast.models import VPD

LEAST_ROUNDS = 3  # also when time is up
USABLE = 0.9  # of the memory
SAVED = ("fast int8",)  # measured as loaded from disk, too

Seconds = dict[str, float]  # of the stages of one pass


@dataclass
class Measurement:
    """What is known of one variant in one case.

    seconds, baseline_seconds: one entry per round; the second is what the baseline needed in the same round, and empty
    if there is no baseline. agreement: see `parity.agreement`; None for the baseline and without one. memory: bytes,
    {"build", "run", "loaded"} as far as known. error: why it could not be measured.
    """

    case: Case
    variant: str
    baseline: str | None
    seconds: list[Seconds] = field(default_factory=list)
    baseline_seconds: list[Seconds] = field(default_factory=list)
    agreement: dict[str, Any] | None = None
    memory: dict[str, int] = field(default_factory=dict)
    error: str | None = None


@dataclass
class _Member:
    """A variant whose process runs.

    memory: bytes when it was made ("resident"), at most meanwhile ("build"), and of the first pass of the case it is
    ready for ("run"). loaded: the case that "loaded" in it is of. error: why the process is no more.
    """

    name: str
    worker: Worker | Turn
    outputs: Path
    case: Case
    memory: dict[str, int] = field(default_factory=dict)
    loaded: Case | None = None
    error: str | None = None

    def prepare(self, case: Case) -> dict[str, int]:
        """One pass for the case, unless it was the last one anyway; what `Measurement` has of its memory."""
        if self.case != case or "run" not in self.memory:
            self.memory["run"] = self.worker.prepare(case, self.outputs)["peak"]
            self.case = case
        names = ("run", "build", "loaded") if case == self.loaded else ("run", "build")
        return {name: self.memory[name] for name in names if self.memory.get(name)}


class Bench:
    """One run. `measurements` holds what is known so far, also when `run` ends early.

    names: of variants, see `catalog`; a baseline is added. rounds: passes of each variant; fewer, but at least three,
    when those of a case have taken `seconds`. A source that is `Shared` has all variants in this process. on_step is
    told what is being done, and how many more of `steps` are; on_measured is given each measurement once, when it can
    be reported.
    """

    def __init__(
        self,
        source: Source,
        config: VPDConfig,
        names: Sequence[str],
        cases: Sequence[Case],
        rounds: int,
        seconds: float,
    ) -> None:
        self.source, self.config, self.names, self.cases = source, config, list(names), list(cases)
        self.rounds, self.seconds = rounds, seconds
        self.on_step: Callable[[str, int], None] = lambda text, done: None
        self.on_measured: Callable[[Measurement], None] = lambda measurement: None
        self.measurements: list[Measurement] = []
        self._reported: set[tuple[Case, str]] = set()
        self._model_bytes = sum(4 * p.numel() for p in VPD.empty(config).parameters())
        self._members: list[_Member] = []

    @property
    def steps(self) -> int:
        """About how many passes there will be."""
        return (len(self.names) + 1) * len(self.cases) * (self.rounds + 1)

    def run(self) -> list[Measurement]:
        """Measure. Whatever happens, no process is left."""
        by_baseline: dict[str, list[Case]] = {}
        for case in self.cases:
            by_baseline.setdefault(self.baseline_of(case), []).append(case)
        try:
            for baseline, cases in by_baseline.items():
                self._run_cases(baseline, cases)
        finally:
            self._close(list(self._members))
        return self.measurements

    def ordered(self) -> list[Measurement]:
        """The measurements by case, and in the order of the catalog."""
        names = list(ENTRIES)
        return sorted(self.measurements, key=lambda m: (self.cases.index(m.case), names.index(m.variant)))

    def baseline_of(self, case: Case) -> str:
        """The plain model, or where its probabilities do not fit into memory, the one that does not store them."""
        needed = 2 * self._model_bytes + plain_bytes(self.config, case)
        return BASELINES[0] if needed <= USABLE * total_memory(self.source.device) else BASELINES[1]

    def _run_cases(self, baseline: str, cases: list[Case]) -> None:
        largest = max(cases, key=lambda case: case.pixels)
        base = self._start(baseline, baseline, largest, cases)
        pending = list(self.names)
        while True:
            group: list[_Member] = []
            while pending and (not group or self._fits(pending[0])):
                member = self._start(pending.pop(0), baseline if base else None, largest, cases)
                group += [member] if member else []
            self._report()
            for case in cases:
                self._measure(case, base, group)
                self._report()
            self._close(group)
            if not pending:
                break
        self._close(list(self._members))

    def _report(self) -> None:
        """Hand over the measurements that are new: they have been measured, or never will be."""
        for measurement in self.measurements:
            key = (measurement.case, measurement.variant)
            if key not in self._reported:
                self._reported.add(key)
                self.on_measured(measurement)

    def _fits(self, name: str) -> bool:
        """Whether another variant's process has room beside those that run.

        In one process they come one by one, beside the baseline, so that a row is there before the next one is made.
        """
        if isinstance(self.source, Shared):
            return False
        held = sum(max(m.memory["resident"], m.memory["run"]) for m in self._members)
        largest_pass = max((m.memory["run"] - m.memory["resident"] for m in self._members), default=0)
        return held + ENTRIES[name].size * self._model_bytes + largest_pass <= USABLE * total_memory()

    def _start(self, name: str, baseline: str | None, case: Case, cases: list[Case]) -> _Member | None:
        """A member, ready for `case`; or None, and the reason among the measurements."""
        self.on_step(f"{name}: starting", 0)
        outputs = self.source.scratch / f"{name.replace(' ', '-')}.safetensors"
        make, source = ENTRIES[name].make, self.source
        worker = Turn(make, source, name) if isinstance(source, Shared) else Worker(make, source, name)
        member = _Member(name, worker, outputs, case)
        self._members.append(member)
        try:
            made = member.worker.wait()
            member.memory = {"resident": made["resident"], "build": made["peak"]}
            self.on_step(f"{name}: first pass, {case}", 1)
            member.prepare(case)
            if name in SAVED and not isinstance(member.worker, Turn):
                member.memory["loaded"], member.loaded = self._peak_when_loaded(member.worker, case), case
        except WorkerError as error:
            self._close([member])
            self.measurements += [Measurement(c, name, baseline, error=str(error)) for c in cases]
            return None
        return member

    def _peak_when_loaded(self, worker: Worker, case: Case) -> int:
        """Most memory of a process that loads the saved model and makes one pass."""
        folder = self.source.scratch / "engine"
        self.on_step("fast model from disk: first pass", 0)
        worker.save(folder)
        loaded = Worker(partial(make_loaded, folder=folder), self.source, "loaded")
        try:
            first = loaded.wait()
            return max(first["peak"], loaded.prepare(case, self.source.scratch / "loaded.safetensors")["peak"])
        finally:
            loaded.close()

    def _measure(self, case: Case, base: _Member | None, group: list[_Member]) -> None:
        """The first pass and all rounds of one case."""
        members = [*([base] if base else []), *group]
        found = {member.name: self._entry(case, member.name, base.name if base else None) for member in members}
        for member in members:
            memory = self._try(member, f"{member.name}: first pass, {case}", partial(member.prepare, case))
            found[member.name].memory = memory or found[member.name].memory
        if base and not base.error:
            expected = Outputs.load(base.outputs)
            for member in group:
                if not member.error:
                    found[member.name].agreement = agreement(Outputs.load(member.outputs), expected)
        self._take_turns(case, members, found, base)
        for member in members:
            found[member.name].error = member.error

    def _take_turns(
        self, case: Case, members: list[_Member], found: dict[str, Measurement], base: _Member | None
    ) -> None:
        end = time.perf_counter() + self.seconds
        for turn in range(self.rounds):
            seconds: dict[str, Seconds] = {}
            for i in range(len(members)):  # another variant goes first in every round
                member = members[(i + turn) % len(members)]
                passed = self._try(member, f"{case}, round {turn + 1}: {member.name}", member.worker.run)
                if passed:
                    seconds[member.name] = passed
            for name, values in seconds.items():  # a round that was interrupted does not count
                found[name].seconds.append(values)
                if base and base.name in seconds:
                    found[name].baseline_seconds.append(seconds[base.name])
            if turn + 1 >= LEAST_ROUNDS and time.perf_counter() > end:
                self.on_step("", (self.rounds - turn - 1) * len(seconds))
                break

    def _entry(self, case: Case, name: str, baseline: str | None) -> Measurement:
        """The measurement to fill: the baseline's of an earlier group, or a new one."""
        for measurement in self.measurements:
            if (measurement.case, measurement.variant) == (case, name):
                return measurement
        self.measurements.append(Measurement(case, name, baseline))
        return self.measurements[-1]

    def _try(self, member: _Member, text: str, call: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """What the call returns, unless the member's process is no more, or ends because of it."""
        if not member.error:
            self.on_step(text, 1)
            try:
                return call()
            except WorkerError as error:
                member.error = str(error)
                self._close([member])
        return None

    def _close(self, members: list[_Member]) -> None:
        for member in list(members):
            if member in self._members:
                self._members.remove(member)
                member.worker.close()
