"""Samples read ahead while the model works on the one before."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from vpd_fast.errors import DatasetError, ImageError

if TYPE_CHECKING:
    from vpd_fast.data import Dataset, Sample

READING_ERRORS = (ImageError, DatasetError, OSError, MemoryError)


def read_ahead(
    dataset: Dataset, indices: Sequence[int], workers: int
) -> Generator[tuple[int, Sample | Exception], None, None]:
    """Yield (index, sample) in order, or (index, error) where reading failed.

    workers: threads that read, at most `workers + 1` samples ahead; several of them call `dataset.load` at once. 0:
    read when asked.
    """
    if workers == 0:
        for index in indices:
            yield index, _load(dataset, index)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="vpd_fast-reading")
    waiting: deque[tuple[int, Future]] = deque()
    try:
        for index in indices:
            waiting.append((index, pool.submit(_load, dataset, index)))
            if len(waiting) > workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _load(dataset: Dataset, index: int) -> Sample | Exception:
    try:
        return dataset.load(index)
    except READING_ERRORS as error:
        return error
