"""Several batches at once on a CPU, each with a share of its threads: more images per second than one after the other.

Threads that share an operator wait for each other at its end, which costs small operators most.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from vpd_fast import _native

T = TypeVar("T")


class Streams:
    """Threads that call functions, `count` at once. Each call has the process's threads for operators if it begins
    alone, and otherwise its share of them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._threads = torch.get_num_threads()
        self._share = max(self._threads // count, 1)
        if self._threads > 1:  # a forked child has one, and OpenMP would wait for those of its parent
            _native.release_threads()  # those of the caller, which now waits for the streams
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="vpd_fast-stream")
        self._running = 0
        self._lock = threading.Lock()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Begin to call the function as soon as a thread is free."""
        return self._pool.submit(self._call, function)

    def _call(self, function: Callable[[], T]) -> T:
        with self._lock:
            self._running += 1
            threads = self._threads if self._running == 1 else self._share
        try:
            _native.set_threads(threads)
            return function()
        finally:
            if threads > self._share:
                _native.release_threads()
            with self._lock:
                self._running -= 1

    def close(self) -> None:
        """Wait for what runs, and forget the rest."""
        self._pool.shutdown(cancel_futures=True)
