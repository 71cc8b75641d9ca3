"""Two real processes measure what one does, to the last bit."""

from __future__ import annotations

import pickle

import pytest

from ..helpers import processes
from .process import TASKS, dataset_with_a_broken_one, main, measure
from .sets import BROKEN


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{rank: what it found}."""
    folder = tmp_path_factory.mktemp("group")
    results = {rank: folder / f"{rank}.pkl" for rank in (0, 1)}
    processes.run_together(
        main, [(rank, str(folder / "store"), str(result)) for rank, result in results.items()], folder / "log", 240
    )
    return {rank: pickle.loads(result.read_bytes()) for rank, result in results.items()}


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_measure_what_one_does(found, task):
    alone = measure(task, dataset_with_a_broken_one(task))
    assert [row["index"] for row in alone["failed"]] == [3]
    assert sorted({row["index"] for row in alone["rows"]}) == [0, 1, 2, 4]
    for rank in (0, 1):
        assert found[rank][task]["metrics"] == alone["metrics"]
        assert found[rank][task] == alone


def test_a_process_without_samples(found):
    assert found[0]["one sample"]["count"] == 1
    assert found[0]["one sample"] == found[1]["one sample"]


def test_an_error_in_one_process_ends_both(found):
    """The broken sample is the second of rank 1."""
    assert found[1]["strict"] == f"ImageError: {BROKEN}"
    assert found[0]["strict"] == f"DatasetError: the evaluation stopped in process 1 of 2: ImageError: {BROKEN}"
