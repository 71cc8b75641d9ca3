"""Launches that are written down instead of made, so that it is known without a GPU what an operator launches."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vpd_fast.kernels.tables import Config

PROCESSORS = 132  # multiprocessors of an H200
Record = Callable[[Any, tuple[int, ...], dict[str, Any]], None]  # kernel, grid, arguments


class _State(threading.local):
    record: Record | None = None
    processors = PROCESSORS
    configs: Mapping[str, Mapping[int, Config]] = {}


state = _State()


@contextlib.contextmanager
def recording(
    record: Record, processors: int = PROCESSORS, configs: Mapping[str, Mapping[int, Config]] | None = None
) -> Iterator[None]:
    """Every launch of this thread is given to `record` instead, as on a GPU with so many multiprocessors.

    configs: of the GPU's table. Kernels in CUDA C++ do nothing.
    """
    before = state.record, state.processors, state.configs
    state.record, state.processors, state.configs = record, processors, configs or {}
    try:
        yield
    finally:
        state.record, state.processors, state.configs = before
