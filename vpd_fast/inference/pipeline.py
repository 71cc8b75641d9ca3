"""The one way from things that are read to predictions: threads read ahead, images of a kind share forwards.

`predict`, `evaluate` and Ray's workers go through `outcomes`, which keeps the order. Memory does not grow with the
number of items.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from vpd_fast.inference.batching import BatchPredictor, launch
from vpd_fast.inference.streams import Streams

T = TypeVar("T")
R = TypeVar("R")
PATIENCE = 4  # batches: how many later images an image waits for, at most, until others of its kind come
IDLE_SECONDS = 0.25  # and how long, while nothing else comes and the model has nothing to do
POLL_SECONDS = 0.005  # how often a CPU's streams are looked at while there is nothing to begin with


class NothingYet(Exception):
    """The next item has not been read yet."""


class Reader(Generic[T]):
    """Reads items in order: `count` ahead by `threads`, or with count 0 each when it is asked for.

    Items are listed by another thread, which may wait for them as long as it takes.
    """

    def __init__(self, items: Iterable[T], read: Callable[[T], Any], count: int, threads: int) -> None:
        self._items, self._read, self._count = iter(items), read, count
        if count == 0:
            return
        self._free = threading.Semaphore(count)
        self._queue: queue.SimpleQueue[tuple[T, Future[Any]] | BaseException] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="vpd_fast-reading")
        self._next: tuple[T, Future[Any]] | BaseException | None = None
        self._closed = False
        threading.Thread(target=self._list, name="vpd_fast-listing", daemon=True).start()

    def _list(self) -> None:
        end: BaseException = StopIteration()
        try:
            for item in self._items:
                self._free.acquire()
                if self._closed:
                    return
                self._queue.put((item, self._pool.submit(self._read, item)))
        except BaseException as error:  # raised again where the items are taken
            end = error
        self._queue.put(end)

    def take(self, seconds: float | None = None) -> tuple[T, Any]:
        """Return (item, read(item)). Raises NothingYet after that time, StopIteration at the end, and what listing
        raised."""
        if self._count == 0:
            item = next(self._items)
            return item, self._read(item)
        try:
            following = self._queue.get(timeout=seconds) if self._next is None else self._next
            self._next = following
            if isinstance(following, BaseException):
                raise following
            item, future = following
            value = future.result(seconds)
        except (queue.Empty, FutureTimeoutError):
            raise NothingYet from None
        self._next = None
        self._free.release()
        return item, value

    def close(self) -> None:
        """Wait for what is being read, and forget the rest."""
        if self._count:
            self._closed = True
            self._free.release()
            self._pool.shutdown(cancel_futures=True)


@dataclass
class Outcome(Generic[T, R]):
    """What became of an item. value: what was read, prepared for the predictor, or why not. seconds: its share of what
    the model took."""

    item: T
    value: Any
    result: R | Exception | None = None
    seconds: float = 0.0


class Failure(Exception):
    """The model or its device failed, at `items` that shared a batch; `cause` is what was raised."""

    def __init__(self, items: list[Any], cause: Exception) -> None:
        super().__init__(items, cause)
        self.items, self.cause = items, cause


@dataclass
class _Flight(Generic[T, R]):
    """A batch that is being computed. finish: waits for its results, and the seconds they took. done: whether `finish`
    would return at once, as far as that is known."""

    group: list[Outcome[T, R]]
    finish: Callable[[], tuple[list[R | Exception], float]]
    done: Callable[[], bool] = lambda: True


class _Batches(Generic[T, R]):
    """Images that wait for company of their kind, and batches that a GPU, or streams on a CPU, compute."""

    def __init__(self, predictor: BatchPredictor[R], streams: Streams | None) -> None:
        self._predictor, self._streams = predictor, streams
        self._groups: dict[Hashable, list[Outcome[T, R]]] = {}  # the one that began first comes first
        self._flying: deque[_Flight[T, R]] = deque()
        # A GPU, and each stream, has its next batch before it ends one.
        self._most_flying = int(predictor.on_gpu) if streams is None else streams.count
        self.patience = PATIENCE

    @property
    def busy(self) -> bool:
        """Whether the batch that was begun first is known to be still computed."""
        return bool(self._flying) and not self._flying[0].done()

    @property
    def seconds(self) -> float | None:
        """How long to wait for another item; None: as long as it takes."""
        if self._flying:
            return POLL_SECONDS if self.busy else 0
        return IDLE_SECONDS if self._groups else None

    def add(self, outcome: Outcome[T, R]) -> None:
        """Take in an image, and begin with its group if that is full."""
        kind = self._predictor.kind(outcome.value)
        group = self._groups.setdefault(kind, [])
        group.append(outcome)
        taken = sum(self._predictor.forwards(other.value) for other in group)
        room = (self._predictor.batch_size - taken) // self._predictor.forwards(outcome.value)  # for more like this one
        self.patience = PATIENCE * (len(group) + max(room, 0))
        if room < 1:
            self._start(self._groups.pop(kind))

    def hurry(self) -> None:
        """Wait for the batch that was begun first, or else begin with the group whose first image waits longest."""
        if self._flying:
            self._land()
        else:
            self._start(self._groups.pop(next(iter(self._groups))))

    def _start(self, group: list[Outcome[T, R]]) -> None:
        values = [outcome.value for outcome in group]
        try:
            if self._streams is None:
                flight = _Flight(group, self._launched(values))
            else:
                future = self._streams.submit(lambda: self._launched(values)())
                flight = _Flight(group, future.result, future.done)
        except Exception as error:
            raise Failure([outcome.item for outcome in group], error) from error
        self._flying.append(flight)
        while len(self._flying) > self._most_flying:
            self._land()

    def _launched(self, values: list[Any]) -> Callable[[], tuple[list[R | Exception], float]]:
        start = time.perf_counter()
        finish = launch(self._predictor, values)
        return lambda: (finish(), time.perf_counter() - start)

    def _land(self) -> None:
        """Wait for the batch that was begun first."""
        flight = self._flying.popleft()
        try:
            results, seconds = flight.finish()
        except Exception as error:
            raise Failure([outcome.item for outcome in flight.group], error) from error
        for outcome, result in zip(flight.group, results, strict=True):
            outcome.result, outcome.seconds = result, seconds / len(flight.group)

    def end(self) -> None:
        """Compute all that waits."""
        while self._groups or self._flying:
            self.hurry()


def outcomes(
    items: Iterable[T],
    read: Callable[[T], Any],
    predictor: BatchPredictor[R],
    *,
    ahead: int,
    threads: int,
    streams: int | None = None,
) -> Generator[Outcome[T, R], None, None]:
    """Yield what becomes of each item, in order.

    read: item -> what the predictor takes (`predictor.prepare(image)`), or an Exception, which is then the result; it
    runs in `threads`, for up to `ahead` items; ahead 0: here, when an item is asked for.
    Images of one kind share forwards of `predictor.batch_size`. One waits for others until PATIENCE batches of later
    images have come, or nothing comes for IDLE_SECONDS.
    streams: how many batches a CPU computes at once; None: `predictor.streams`.

    Raises Failure where the model fails, and what listing raises; what was predicted by then is yielded before.
    """
    waiting: deque[Outcome[T, R]] = deque()
    count = predictor.streams if streams is None else streams
    with ExitStack() as stack:
        reader = stack.enter_context(closing(Reader(items, read, ahead, threads)))
        parallel = stack.enter_context(closing(Streams(count))) if count > 1 else None
        batches: _Batches[T, R] = _Batches(predictor, parallel)
        try:
            while True:
                try:
                    item, value = reader.take(batches.seconds)
                except NothingYet:
                    if not batches.busy:
                        batches.hurry()
                except StopIteration:
                    batches.end()
                    break
                else:
                    outcome: Outcome[T, R] = Outcome(item, value)
                    waiting.append(outcome)
                    if isinstance(value, Exception):
                        outcome.result = value
                    else:
                        batches.add(outcome)
                    while len(waiting) > batches.patience and waiting[0].result is None:
                        batches.hurry()
                while waiting and waiting[0].result is not None:
                    yield waiting.popleft()
        except (Exception, KeyboardInterrupt):
            yield from (outcome for outcome in waiting if outcome.result is not None)
            raise
        yield from waiting
