"""The loop over the images of a run, few or very many: reading ahead, predicting, writing behind, recording each.

Memory grows neither with the images nor with their results: names are listed as they are needed.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from vpd_fast.errors import ImageError, InputError, ModelError, VPDFastError, described
from vpd_fast.files import ends_writing
from vpd_fast.pictures.decoding import TOO_LARGE
from vpd_fast.pictures.reading import read_image

if TYPE_CHECKING:
    import numpy as np

    from vpd_fast.inference.records import Record, Sink

T = TypeVar("T")
R = TypeVar("R")
READERS = 8  # threads at most; more would only fight for the disk
WRITERS = 2  # threads that write pictures while the next image is predicted


def within_memory(call: Callable[..., T], *arguments: Any) -> T:
    """Return `call(*arguments)`. Raises ImageError where the memory, or a GPU's, does not suffice for the image."""
    try:
        return call(*arguments)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ImageError(TOO_LARGE) from error


def image_error(error: Exception, name: str, what: str) -> ImageError:
    """Return what an error amounts to as that of one image: decoders and file systems raise all kinds of them.

    what: what failed, said of errors that are none of ours.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return ImageError(f"{name}: {TOO_LARGE}")
    if isinstance(error, VPDFastError):
        return ImageError(str(error))
    return ImageError(f"{name}: {what} ({type(error).__name__}: {error})")


def model_error(error: Exception, name: str) -> VPDFastError:
    """Return what an error of the model or its device at an image or sample amounts to: one that ends the run."""
    return error if isinstance(error, VPDFastError) else ModelError(f"{name}: the model failed ({described(error)})")


def predict_images(
    predictor: Callable[[np.ndarray], Any],
    images: Iterable[tuple[str, str]],
    write: Callable[[Any, str], Record],
    sink: Sink,
    *,
    prefetch: int = 4,
) -> Iterator[Record]:
    """Predict on images (name, path) and yield one record for each, in order, after the sink has it.

    predictor: array (H,W,3), as `read_image` returns it -> result. write: (result, name) -> what to record; it runs in
    a thread, while the next image is predicted. prefetch: how many images are read ahead, and how many results
    may wait for being written.
    Images that are done are skipped (`sink.skipped`). Those that cannot be read, that are too large for the memory or
    whose files cannot be written give a record with "error". A full or broken disk ends the run with ImageError, and
    any other error of the model, such as a GPU's, with ModelError that names the image.
    However it ends, images whose files were written by then are recorded.
    """
    waiting: deque[tuple[Record, Future[Record] | None]] = deque()
    with ThreadPoolExecutor(WRITERS) as writers, contextlib.ExitStack() as stack:
        ahead = read_ahead(_left(images, sink), _read, prefetch, min(prefetch, READERS))
        stack.callback(ahead.close)
        try:
            for (name, _), image in ahead:
                record, result = _predict(predictor, name, image)
                waiting.append((record, None if result is None else writers.submit(write, result, name)))
                while waiting and (len(waiting) > prefetch or waiting[0][1] is None or waiting[0][1].done()):
                    yield _recorded(*waiting.popleft(), sink)
            while waiting:
                yield _recorded(*waiting.popleft(), sink)
        except BaseException:
            while waiting:  # predicted already, so worth keeping
                with contextlib.suppress(Exception):  # the error that ends the run is the one to tell
                    _recorded(*waiting.popleft(), sink)
            raise


def _left(images: Iterable[tuple[str, str]], sink: Sink) -> Iterator[tuple[str, str]]:
    for name, path in images:
        if sink.is_done(name):
            sink.skipped += 1
        else:
            yield name, path


def read_ahead(
    items: Iterable[T], read: Callable[[T], R], count: int, threads: int
) -> Generator[tuple[T, R], None, None]:
    """Yield (item, read(item)) in order, while `threads` read up to `count` items ahead; count 0: read when asked."""
    if count == 0:
        yield from ((item, read(item)) for item in items)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="vpd_fast-reading")
    waiting: deque[tuple[T, Future[R]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(read, item)))
            if len(waiting) > count:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read(image: tuple[str, str]) -> np.ndarray | Exception:
    path = image[1]
    try:
        return read_image(path)
    except Exception as error:
        return image_error(error, path, "cannot be read")


def _predict(predictor: Callable[[np.ndarray], Any], name: str, image: np.ndarray | Exception) -> tuple[Record, Any]:
    """Return the record of an image so far, and its result, None where it failed."""
    if isinstance(image, Exception):
        return {"image": name, "error": str(image)}, None
    start = time.perf_counter()
    try:
        result = within_memory(predictor, image)
    except (ImageError, InputError) as error:
        return {"image": name, "error": f"{name}: {error}"}, None
    except Exception as error:  # the next image would fare no better
        raise model_error(error, name) from error
    seconds = round(time.perf_counter() - start, 4)
    return {"image": name, "width": image.shape[1], "height": image.shape[0], "seconds": seconds}, result


def _recorded(record: Record, written: Future[Record] | None, sink: Sink) -> Record:
    """Return the whole record, once the files of the image are written and the sink has it."""
    if written is not None:
        try:
            record |= written.result()
        except Exception as error:
            name = record["image"]
            failure = image_error(error, name, "the results cannot be written")
            if ends_writing(error):  # no later image could be written either
                raise failure from error
            record = {"image": name, "error": str(failure)}
    sink.add(record)
    return record


predict_shard = predict_images  # its name when it lived in inference/shards.py
