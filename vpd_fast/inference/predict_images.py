"""The loop over the images of a run, few or very many: what `outcomes` predicts is written behind, and recorded.

Memory grows neither with the images nor with their results: names are listed as they are needed.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

from vpd_fast.errors import ImageError, ModelError, VPDFastError, described
from vpd_fast.files import ends_writing
from vpd_fast.inference.batching import OUT_OF_MEMORY, BatchPredictor, OneByOne
from vpd_fast.inference.pipeline import Failure, Outcome, outcomes
from vpd_fast.pictures.decoding import TOO_LARGE
from vpd_fast.pictures.reading import read_image

if TYPE_CHECKING:
    import numpy as np

    from vpd_fast.inference.records import Record, Sink

READERS = 8  # threads at most; more would only fight for the disk
WRITERS = min(max(os.cpu_count() or 1, 2), READERS)  # threads that write pictures while the next are predicted


def image_error(error: Exception, name: str, what: str) -> ImageError:
    """Return what an error amounts to as that of one image: decoders and file systems raise all kinds of them.

    what: what failed, said of errors that are none of ours.
    """
    if isinstance(error, OUT_OF_MEMORY):
        return ImageError(f"{name}: {TOO_LARGE}")
    if isinstance(error, VPDFastError):
        return ImageError(str(error))
    return ImageError(f"{name}: {what} ({type(error).__name__}: {error})")


def model_error(error: Exception, name: str) -> VPDFastError:
    """Return what an error of the model or its device at an image or sample amounts to: one that ends the run."""
    return error if isinstance(error, VPDFastError) else ModelError(f"{name}: the model failed ({described(error)})")


def together(names: Sequence[str]) -> str:
    """Return how an error calls the images or samples of a batch."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} others of its batch"


def read_prepared(predictor: BatchPredictor[Any], source: Any, name: str) -> Any:
    """Return an image, read and prepared for the predictor, or its error."""
    try:
        return predictor.prepare(read_image(source))
    except Exception as error:
        return image_error(error, name, "cannot be read")


def predict_images(
    predictor: Callable[[np.ndarray], Any],
    images: Iterable[tuple[str, str]],
    write: Callable[[Any, str], Record],
    sink: Sink,
    *,
    prefetch: int = 4,
) -> Iterator[Record]:
    """Predict on images (name, path) and yield one record for each, in order, after the sink has it.

    predictor: of `make_predictor`, whose `batch_size` images of one size share, or any function of an array (H,W,3), as
    `read_image` returns it. write: (result, name) -> what to record; it runs in a thread, while the next images are
    predicted. prefetch: how many images are read ahead, and how many results may wait for being written.
    Images that are done are skipped (`sink.skipped`). Those that cannot be read, that are too large for the memory or
    whose files cannot be written give a record with "error". A full or broken disk ends the run with ImageError, and
    any other error of the model, such as a GPU's, with ModelError that names the image.
    However it ends, images whose files were written by then are recorded.
    """
    model = predictor if isinstance(predictor, BatchPredictor) else OneByOne(predictor)
    waiting: deque[tuple[Record, Future[Record] | None]] = deque()
    found = outcomes(
        _left(images, sink), lambda image: read_prepared(model, image[1], image[1]), model,
        ahead=prefetch, threads=min(prefetch, READERS),
    )  # fmt: skip
    with ThreadPoolExecutor(WRITERS) as writers, closing(found):
        try:
            for outcome in found:
                record, result = _begin(outcome)
                waiting.append((record, None if result is None else writers.submit(write, result, record["image"])))
                del outcome, result  # the writer has it, and forgets it
                while waiting and (len(waiting) > prefetch or waiting[0][1] is None or waiting[0][1].done()):
                    yield _recorded(*waiting.popleft(), sink)
            while waiting:
                yield _recorded(*waiting.popleft(), sink)
        except BaseException as error:
            while waiting:  # predicted already, so worth keeping
                with contextlib.suppress(Exception):  # the error that ends the run is the one to tell
                    _recorded(*waiting.popleft(), sink)
            if isinstance(error, Failure):
                raise model_error(error.cause, together([name for name, _ in error.items])) from error.cause
            raise


def _left(images: Iterable[tuple[str, str]], sink: Sink) -> Iterator[tuple[str, str]]:
    for name, path in images:
        if sink.is_done(name):
            sink.skipped += 1
        else:
            yield name, path


def _begin(outcome: Outcome[tuple[str, str], Any]) -> tuple[Record, Any]:
    """Return the record of an image so far, and its result, None where it failed."""
    name, _ = outcome.item
    if isinstance(outcome.result, Exception):
        unread = outcome.result is outcome.value
        return {"image": name, "error": str(outcome.result) if unread else f"{name}: {outcome.result}"}, None
    height, width = outcome.value.size
    return {"image": name, "width": width, "height": height, "seconds": round(outcome.seconds, 4)}, outcome.result


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
