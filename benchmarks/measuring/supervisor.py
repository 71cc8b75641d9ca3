"""Runs a plan within its time: items in their order, each within its cap, whatever becomes of the measuring process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring.plan import Item, Plan, Row
from measuring.record import DONE, Record, short
from measuring.worker import PREPARATION, Lost, Worker

MAX_PROCESSES = 12  # that are started in one run: after so many something is wrong with the machine
MIN_SECONDS = 2.0  # with less time left nothing is begun


class Unusable(Exception):
    """No process can measure here. The message says why."""


class Supervisor:
    """One run of a plan.

    seconds: of the whole run. start, preparation: seconds until a process must be ready, and for what happens between
    steps. grace: seconds that a step may take beyond its item's cap. report: is told what there is to print.
    """

    def __init__(
        self,
        plan: Plan,
        options: dict[str, Any],
        record: Record,
        seconds: float,
        log: Path,
        *,
        start: float = 120.0,
        preparation: float = 60.0,
        grace: float = 5.0,
        report: Callable[[str], None] = print,
    ) -> None:
        self._plan, self._options, self._record, self._log, self._report = plan, options, record, log, report
        self._seconds, self._start, self._preparation, self._grace = seconds, start, preparation, grace
        self._end = 0.0
        self._worker: Worker | None = None
        self._processes = 0

    def run(self) -> None:
        """Measure what is not done yet. Raises Unusable. In any case results are written and no process is left."""
        self._end = time.monotonic() + self._seconds
        try:
            self._ready_worker()  # which says whether results that are there are of this machine
            for item in self._plan.items:
                if self._record.is_done(item):
                    self._report(f"== {item.name}: done before")
                elif self._end - time.monotonic() < MIN_SECONDS:
                    self._record.entry(item)
                    self._report(f"== {item.name}: left, the time is over")
                else:
                    self._run_item(item)
        finally:
            if self._worker is not None:
                self._worker.kill()
            self._record.write()
            self._record.write_page(self._plan.items)

    def _run_item(self, item: Item) -> None:
        """One item; a process that is lost costs the step at hand only."""
        worker = self._ready_worker()  # whose start is not of the item's time
        entry, begin = self._record.entry(item), time.monotonic()
        until = min(begin + item.seconds, self._end)
        self._report(f"== {item.name} (at most {until - begin:.0f} s): {item.decides}")
        tried = set(self._record.done_steps(item))
        entry["steps"] = {name: step for name, step in entry["steps"].items() if name in tried}
        reached: bool | None = None
        while reached is None and time.monotonic() < until:
            try:
                worker = self._ready_worker()
                worker.begin(item, tried, until - time.monotonic())
                reached = self._follow(worker, item, tried, until)
            except Lost:
                worker.kill()
                self._worker = None
                if any(name.startswith(PREPARATION) for name in entry["steps"]):
                    break  # it would be lost at the same place again
        failed = any(step["status"] != DONE for step in entry["steps"].values())
        entry["status"] = "failed" if failed else DONE if reached else "partly"
        entry["seconds"] = round(entry["seconds"] + time.monotonic() - begin, 1)
        self._record.write()

    def _follow(self, worker: Worker, item: Item, tried: set[str], until: float) -> bool:
        """Keep what the process sends of an item. Returns whether all steps were reached.

        Raises Lost when the process is gone, useless, or took too long.
        """
        step, seconds = PREPARATION, self._preparation
        while True:
            begin = time.monotonic()
            limit = min(begin + seconds, until + self._grace)
            try:
                message = worker.receive(limit)
            except Lost as error:
                self._keep(item, tried, step, "died", error=str(error))
                raise
            if message is None:
                status = "hung" if limit == begin + seconds else "cut"
                self._keep(item, tried, step, status, error=f"ended after {time.monotonic() - begin:.0f} s")
                raise Lost(status)
            kind, content = message
            if kind == "end":
                return content["reached"]
            if kind == "begin":
                step, seconds = content["step"], content["seconds"]
                continue
            fatal = content.pop("fatal", False)
            self._keep(item, tried, content.pop("step"), kind, **content)
            if fatal:
                raise Lost(content["error"])
            step, seconds = f"{PREPARATION} after {step}", self._preparation

    def _keep(self, item: Item, tried: set[str], step: str, status: str, **content: Any) -> None:
        """Store and print what came of a step, which is not tried again in this run."""
        tried.add(step)
        self._record.add(item, step, status, **content)
        for row in content.get("rows", []):
            self._report(f"{item.name} / {step}: {line_of(row)}")
        if status != DONE:
            self._report(f"{item.name} / {step}: {status.upper()}: {content['error']}")

    def _ready_worker(self) -> Worker:
        """The process that measures; a new one if there is none. Raises Unusable."""
        if self._worker is not None:
            return self._worker
        if self._processes == MAX_PROCESSES:
            raise Unusable(f"{MAX_PROCESSES} processes were lost; see {self._log}")
        self._processes += 1
        self._worker = worker = Worker(self._plan, self._options, self._log)
        try:
            message = worker.receive(time.monotonic() + self._start)
        except Lost as error:
            raise Unusable(str(error)) from error
        if message is None:
            raise Unusable(f"the process was not ready after {self._start:.0f} s")
        kind, content = message
        if kind != "ready":
            raise Unusable(content["error"])
        if self._processes == 1 and self._record.set_facts(content["facts"]):
            self._report("what was measured before is of another machine or other software; it is kept beside")
        return worker


def line_of(row: Row) -> str:
    """A row in one line."""
    return ", ".join(f"{key} {short(value)}" for key, value in row.items())
