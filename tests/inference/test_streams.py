"""Batches that a CPU computes at once: each has its share of the threads, and its results are those it has alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from vpd_fast import VPD, VPDConfig, _native, optimize
from vpd_fast.errors import ImageError, InputError
from vpd_fast.inference import make_predictor, predict, running
from vpd_fast.inference.batching import BatchPredictor
from vpd_fast.inference.pipeline import Failure, outcomes
from vpd_fast.inference.predict import predict_each
from vpd_fast.inference.streams import Streams
from vpd_fast.models.random_weights import randomize

from ..helpers.backbones import LEAST
from .stand_in import StandIn

IMAGES = [np.random.default_rng(i).integers(0, 256, (100 + i % 2, 128, 3), np.uint8) for i in range(9)]


def fast_model() -> Any:
    config = VPDConfig(base_size=128, channels=32, num_classes=5, backbone=LEAST)
    return optimize(randomize(VPD.empty(config), 0).eval(), "int8")


@pytest.fixture
def four_threads(monkeypatch) -> Iterator[None]:
    """Four threads for this one and for those to come, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


class Meeting(BatchPredictor[int]):
    """Ends a batch when `parties` are being computed; notes how many threads each has."""

    batch_size = 1

    def __init__(self, parties: int, streams: int) -> None:
        self.streams = streams
        self._barrier = threading.Barrier(parties)
        self.threads: list[int] = []

    def kind(self, prepared: Any) -> int:
        return 0

    def forwards(self, prepared: Any) -> int:
        return 1

    def start(self, group: Sequence[Any]) -> Callable[[], list[Any]]:
        self.threads.append(torch.get_num_threads())
        self._barrier.wait(30)
        if "broken" in group:
            return lambda: [ImageError("broken")]
        if "fatal" in group:
            raise ZeroDivisionError
        return lambda: [value.upper() for value in group]


def run(predictor: Any, values: Sequence[str], **options: Any) -> Iterator[Any]:
    return outcomes(values, lambda value: value, predictor, ahead=2, threads=1, **options)


@pytest.mark.usefixtures("four_threads")
def test_batches_run_at_once_each_with_its_share() -> None:
    predictor = Meeting(parties=2, streams=2)
    assert [outcome.result for outcome in run(predictor, "abcdef")] == [*"ABCDEF"]
    assert set(predictor.threads) == {2, 4}  # the first began alone
    assert predictor.threads.count(2) >= 3  # one of each two that met
    assert torch.get_num_threads() == 4
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [4]


def test_what_is_read_slowly_begins_beside_what_runs() -> None:
    def read(value: str) -> str:
        time.sleep(0.05)
        return value

    found = outcomes("abcd", read, Meeting(parties=2, streams=2), ahead=1, threads=1)
    assert [outcome.result for outcome in found] == [*"ABCD"]


@pytest.mark.usefixtures("four_threads")
def test_what_begins_alone_has_all_threads() -> None:
    predictor = Meeting(parties=1, streams=8)
    for value in "abc":
        assert [outcome.result for outcome in run(predictor, value)] == [value.upper()]
    assert predictor.threads == [4, 4, 4]
    assert [outcome.result for outcome in run(predictor, "abc", streams=1)] == [*"ABC"]


def test_a_broken_image_and_a_broken_model() -> None:
    found = []
    with pytest.raises(Failure) as failure:
        found.extend(run(Meeting(parties=1, streams=2), ["a", "broken", "c", "fatal", "e", "f"]))
    assert failure.value.items == ["fatal"]
    assert isinstance(failure.value.cause, ZeroDivisionError)
    assert [str(outcome.result) for outcome in found] == ["A", "broken", "C"]


def test_threads_end_with_the_run() -> None:
    found = run(Meeting(parties=1, streams=3), "abcdef")
    next(found)
    found.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vpd_fast-stream")]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_results_are_those_of_single_calls(batch_size: int) -> None:
    model = fast_model()
    expected = [predict(model, image).labels for image in IMAGES]
    for streams in (None, 1, 3):
        results = predict(model, IMAGES, batch_size=batch_size, streams=streams)
        assert all(np.array_equal(result.labels, labels) for result, labels in zip(results, expected, strict=True))


def test_what_comes_live_is_not_taken_ahead() -> None:
    taken: list[int] = []

    def live() -> Iterator[np.ndarray]:
        for i, image in enumerate(IMAGES):
            taken.append(i)
            yield image

    results = predict_each(fast_model(), live(), streams=4)
    next(results)
    assert taken == [0]


@pytest.mark.usefixtures("four_threads")
def test_the_default_depends_on_model_and_machine(monkeypatch) -> None:
    fast = fast_model()
    assert make_predictor(fast).streams == 4
    assert make_predictor(fast, streams=7).streams == 7
    monkeypatch.setattr(running, "MAX_STREAMS", 3)
    assert make_predictor(fast).streams == 3
    monkeypatch.setattr(running, "SMALL_MODEL", fast.nbytes - 1)
    assert make_predictor(fast).streams == 1
    assert make_predictor(StandIn()).streams == 1
    assert make_predictor(StandIn(), streams=2).streams == 2
    monkeypatch.setattr(_native, "why_missing", lambda name: f"{name} is missing")
    assert make_predictor(StandIn()).streams == 1
    with pytest.raises(InputError, match="streams must be 1 where threads cannot be divided: _C is missing"):
        make_predictor(StandIn(), streams=2)


@pytest.mark.parametrize("streams", [0, -1, True, 1.5, "4"])
def test_bad_numbers(streams: Any) -> None:
    with pytest.raises(InputError, match="streams must be a positive int or None, got"):
        make_predictor(StandIn(), streams=streams)


def test_a_gpu_has_one() -> None:
    class OnGpu:
        device = torch.device("cuda")

    assert running.streams_for(OnGpu(), None) == 1
    with pytest.raises(InputError, match="streams must be 1 for a model on cuda"):
        running.streams_for(OnGpu(), 2)


def test_streams_wait_for_what_runs() -> None:
    streams, started, done = Streams(1), threading.Event(), threading.Event()

    def work() -> str:
        started.set()
        done.wait(30)
        return "done"

    running_one, waiting = streams.submit(work), streams.submit(work)
    started.wait(30)
    threading.Timer(0.05, done.set).start()
    streams.close()
    assert running_one.result() == "done"
    assert waiting.cancelled()
