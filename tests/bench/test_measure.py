"""benchmarks/measure.py: order, caps, what a failing, dying or hanging step costs, and what a second run repeats."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

# A plan whose steps note their names in a file when they begin.
STAND_INS = """
import os, time
from measuring.plan import Item, Plan, Step

class Setting:
    def __init__(self, options):
        self.options = options
        if options.get("unusable"):
            raise RuntimeError("no device")
    def facts(self):
        return {"device": self.options.get("device", "stand-in")}
    def conditions(self, start):
        return {"sm_mhz": 1755.0}
    def tidy(self):
        pass

def note(setting, name, then=lambda: None):
    def run():
        with open(setting.options["log"], "a") as file:
            file.write(name + "\\n")
        then()
        return {"value": len(name)}
    return run

def fail():
    raise ValueError("wrong\\nin two lines")

def break_context():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def good(setting):
    yield Step("one", note(setting, "one"))
    yield Step("two", note(setting, "two"))

def bad(setting):
    yield Step("fails", note(setting, "fails", fail))
    yield Step("breaks", note(setting, "breaks", break_context))
    yield Step("dies", note(setting, "dies", os.abort))
    if not setting.options.get("patient"):
        yield Step("hangs", note(setting, "hangs", lambda: time.sleep(60)), seconds=0.3)
    yield Step("last", note(setting, "last"))

def slow(setting):
    for i in range(100):
        yield Step(f"slow {i}", note(setting, f"slow {i}", lambda: time.sleep(0.1)))

def long(setting):
    yield Step("long", note(setting, "long", lambda: time.sleep(60)))
    yield Step("never", note(setting, "never"))

def unprepared(setting):
    yield Step("first", note(setting, "first"))
    raise ValueError("no second")

def items(*names, seconds=20.0):
    return Plan(tuple(Item(name, "what it is", seconds, f"stand_ins:{name}") for name in names), "stand_ins:Setting")
"""


@pytest.fixture
def run(tmp_path, monkeypatch, script):
    """run(*names, seconds=..., whole=..., again=..., options) -> record, steps that began, what was printed."""
    script("measure")
    sys.modules.pop("stand_ins", None)  # of another test
    (tmp_path / "stand_ins.py").write_text(STAND_INS)
    monkeypatch.syspath_prepend(str(tmp_path))
    supervisor, record = script("measuring.supervisor"), script("measuring.record")
    out, log = tmp_path / "out", tmp_path / "begun"
    out.mkdir()

    def call(*names: str, seconds: float = 20.0, whole: float = 60.0, again: bool = False, **options: object):
        log.write_text("")
        printed: list[str] = []
        known = record.Record(out, again=again)
        plan = script("stand_ins").items(*names, seconds=seconds)
        settings = {"log": str(log), **options}
        supervisor.Supervisor(
            plan, settings, known, whole, out / "measure.log", preparation=5.0, grace=0.2, report=printed.append
        ).run()
        return known, log.read_text().split("\n")[:-1], printed

    call.folder = out
    return call


def content(run) -> dict:
    return json.loads((run.folder / "measure.json").read_text())


def test_items_and_steps_run_in_their_order(run) -> None:
    record, begun, printed = run("good", "slow", seconds=1.0)
    assert begun[:3] == ["one", "two", "slow 0"]
    stored = content(run)
    assert stored["facts"] == {"device": "stand-in"}
    assert stored["items"]["good"]["status"] == "done"
    step = stored["items"]["good"]["steps"]["one"]
    assert (step["status"], step["rows"], step["gpu"]) == ("done", [{"value": 3}], {"sm_mhz": 1755.0})
    assert "good / one: value 3" in printed
    page = (run.folder / "measure.txt").read_text()
    assert "== good (done, " in page
    assert page.index("== good") < page.index("== slow (partly, ")


def test_an_item_ends_at_its_cap_and_is_continued(run) -> None:
    start = time.monotonic()
    record, first, _ = run("slow", "good", seconds=0.5)
    assert time.monotonic() - start < 10
    assert "two" in first  # whatever the item before it left
    assert content(run)["items"]["slow"]["status"] == "partly"
    count = len(first) - 2
    assert 2 <= count <= 6
    _, second, printed = run("slow", "good", seconds=0.5)
    assert second[0] == f"slow {count}"
    assert "== good: done before" in printed
    _, again, _ = run("good", again=True)
    assert again == ["one", "two"]


def test_what_fails_dies_or_hangs_costs_one_step(run) -> None:
    record, begun, printed = run("bad", "good")
    assert begun == ["fails", "breaks", "dies", "hangs", "last", "one", "two"]
    steps = content(run)["items"]["bad"]["steps"]
    assert {name: step["status"] for name, step in steps.items()} == {
        "fails": "failed", "breaks": "failed", "dies": "died", "hangs": "hung", "last": "done",
    }  # fmt: skip
    assert steps["fails"]["error"] == "ValueError: wrong"
    assert "SIGABRT" in steps["dies"]["error"]
    assert content(run)["items"]["bad"]["status"] == "failed"
    assert any("bad / hangs: HUNG" in line for line in printed)
    assert "DIED dies: the process ended with signal SIGABRT" in (run.folder / "measure.txt").read_text()
    _, second, _ = run("bad", "good", patient=True)  # repeats what failed, and nothing else
    assert second == ["fails", "breaks", "dies"]
    assert "hangs" not in content(run)["items"]["bad"]["steps"]


def test_a_step_is_ended_at_the_cap_of_its_item(run) -> None:
    start = time.monotonic()
    _, begun, _ = run("long", "good", seconds=0.5)
    assert time.monotonic() - start < 15
    assert begun == ["long", "one", "two"]
    assert content(run)["items"]["long"]["steps"]["long"]["status"] == "cut"


def test_the_whole_run_ends_in_time(run) -> None:
    _, begun, printed = run("slow", "good", whole=4.0)
    assert "one" not in begun
    assert "== good: left, the time is over" in printed
    assert content(run)["items"]["good"]["status"] == "left"


def test_what_makes_the_steps_may_fail(run) -> None:
    _, begun, _ = run("unprepared", "good")
    assert begun == ["first", "one", "two"]
    assert content(run)["items"]["unprepared"]["steps"]["preparation after first"]["error"] == "ValueError: no second"


def test_results_of_other_machines_are_set_aside(run) -> None:
    run("good")
    _, begun, printed = run("good", device="another")
    assert begun == ["one", "two"]
    assert "it is kept beside" in "".join(printed)
    assert json.loads((run.folder / "measure.json.old").read_text())["facts"] == {"device": "stand-in"}


def test_no_process_can_measure(run, script) -> None:
    with pytest.raises(script("measuring.supervisor").Unusable, match="RuntimeError: no device"):
        run("good", unusable=True)


def test_files_stay_small(run, script, tmp_path: Path) -> None:
    module, plan = script("measuring.record"), script("measuring.plan")
    item = plan.Item("many", "", 1, "")
    record = module.Record(run.folder)
    rows = [{"text": "x" * 5000, "number": 1 / 3}] * 100
    for i in range(40):
        record.add(item, f"step {i}", "done", rows=rows)
    record.write()
    record.write_page([item])
    assert (run.folder / "measure.json").stat().st_size < module.MAX_BYTES
    assert (run.folder / "measure.txt").stat().st_size < module.MAX_BYTES
    assert content(run)["rows_left_out"] >= 1000
    assert content(run)["items"]["many"]["steps"]["step 0"]["rows"][0]["number"] == 0.33333
