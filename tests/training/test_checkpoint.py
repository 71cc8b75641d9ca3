"""Checkpoints survive whatever ends a process, and hold everything that a run goes on with."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vpd_fast.errors import CheckpointError, InputError
from vpd_fast.training import checkpoint
from vpd_fast.training.checkpoint import CheckpointStore
from vpd_fast.training.logging import RunLog


def text(content: str):
    return lambda path: path.write_text(content)


def test_the_last_ones_stay(tmp_path):
    store = CheckpointStore(tmp_path / "run", keep=2)
    assert store.last() is None
    for step in (5, 10, 1_000_000, 11):
        store.save(step, {"a": text(f"{step}")})
    assert store.steps() == [11, 1_000_000]
    assert store.last() == tmp_path / "run" / "step_1000000"
    store.save(1_000_000, {"a": text("again")})
    assert (store.last() / "a").read_text() == "1000000"
    assert sorted(path.name for path in store.folder.iterdir()) == ["step_000011", "step_1000000"]
    with pytest.raises(InputError, match="at least 1, got 0"):
        CheckpointStore(tmp_path, keep=0)


def full(path: Path) -> None:
    path.write_text("half of it")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_what_was_there(tmp_path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"step 1 cannot be written .*the disk is full\); there is no earlier one"
    ):
        store.save(1, {"a": text("1"), "b": full})
    assert list(tmp_path.iterdir()) == []
    store.save(2, {"a": text("2")})
    with pytest.raises(CheckpointError, match=r"the disk is full\); the last one is .*step_000002$"):
        store.save(3, {"a": text("3"), "b": full})
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"]
    assert (store.last() / "a").read_text() == "2"


KILLED = """
import sys, time
from pathlib import Path
from vpd_fast.training.checkpoint import CheckpointStore

store = CheckpointStore(sys.argv[1])
store.save(1, {"a": lambda path: path.write_text("1")})

def hang(path):
    path.write_text("half of it")
    print("ready", flush=True)
    sys.stdin.read()

store.save(2, {"a": lambda path: path.write_text("2"), "b": hang})
"""


def test_a_process_killed_while_saving(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    store = CheckpointStore(tmp_path)
    assert store.last().name == "step_000001"
    assert len(list(tmp_path.iterdir())) == 2  # and the half-written one, hidden
    assert [path.suffix for path in store.clean()] == [".tmp"]
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_a_process_killed_before_it_removed_the_oldest(tmp_path):
    """A run that had saved its last step then saves nothing more, which would remove it."""
    for step in (1, 2, 3):
        CheckpointStore(tmp_path, keep=5).save(step, {"a": text("")})
    store = CheckpointStore(tmp_path, keep=2)
    assert store.clean() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000003"]


def test_an_evaluation_that_did_not_count_is_not_logged_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    entries = [{"step": 2, "evaluation": {}}, {"step": 4, "loss": 1.0}, {"step": 4, "evaluation": {}}, {"step": 5}]
    for evaluated, kept in ((4, 3), (2, 2)):
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        RunLog(tmp_path, start=4, steps=9, evaluated=evaluated, tensorboard=False, bar=False).close()
        assert [json.loads(line) for line in path.read_text().splitlines()] == entries[:kept]


def test_the_index(tmp_path):
    store = CheckpointStore(tmp_path)
    assert store.read_index() == {}
    store.save(3, {"a": text("")})
    store.write_index(best={"step": 3, "metric": "mIoU", "value": 0.5})
    store.write_index(evaluated=3)
    assert store.read_index() == {
        "best": {"step": 3, "metric": "mIoU", "value": 0.5}, "evaluated": 3, "last": "step_000003",
    }  # fmt: skip
    (tmp_path / checkpoint.INDEX).write_text("{")
    with pytest.raises(CheckpointError, match="is not readable JSON"):
        store.read_index()


def numbers() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        torch.rand(()).item(),
    ]


def test_random_numbers_go_on(tmp_path):
    numbers()  # now a second Gaussian is kept back by Python and numpy
    checkpoint.write_state(tmp_path / checkpoint.STATE, {"step": 1, "random": checkpoint.random_state()})
    expected = numbers()
    numbers()
    checkpoint.set_random_state(checkpoint.read_state(tmp_path)["random"])
    assert numbers() == expected


def test_states_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match="is not a checkpoint to resume from"):
        checkpoint.read_state(tmp_path)
    (tmp_path / checkpoint.STATE).write_bytes(b"no state")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read_state(tmp_path)
    torch.save([1], tmp_path / checkpoint.STATE)
    with pytest.raises(CheckpointError, match="is no training state"):
        checkpoint.read_state(tmp_path)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile",)


def test_a_state_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"step": 1, "x": Hostile()}, tmp_path / checkpoint.STATE)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read_state(tmp_path)
    assert not (tmp_path / "hostile").exists()
