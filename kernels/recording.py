"""Launches that are written down instead of made, so that it is known without a GPU what an operator launches."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

PROCESSORS = 132  # multiprocessors of an H200
Record = Callable[[Any, tuple[int, ...], dict[str, Any]], None]  # kernel, grid, arguments


class _State(threading.local):
    record: Record | None = None
    processors = PROCESSORS


state = _State()


@contextlib.contextmanager
def recording(record: Record, processors: int = PROCESSORS) -> Iterator[None]:
    """Every launch of this thread is given to `record` instead, as on a GPU with so many multiprocessors.

    Kernels in CUDA C++ do nothing.
    """
    before = state.record, state.processors
    state.record, state.processors = record, processors
    try:
        yield
    finally:
        state.record, state.processors = before
