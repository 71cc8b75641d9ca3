"""Several images in one forward: what the predictors of all tasks share, and what happens without enough memory."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch

from vpd_fast.errors import ImageError, InputError
from vpd_fast.pictures.decoding import TOO_LARGE

if TYPE_CHECKING:
    from torch import Tensor

R = TypeVar("R")
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Prepared:
    """An image as a predictor wants it.

    image: as it was read, (H,W,3). views: what the model sees of it, resized, (h,w,3) each. given: what this image is
    conditioned on in place of the predictor's own: a scene, or tokens of sentences.
    """

    image: np.ndarray
    views: tuple[np.ndarray, ...]
    given: Any = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.image.shape[0], self.image.shape[1]


class BatchPredictor(Generic[R]):
    """Base of the predictors: images are prepared one by one, in any thread, and predicted together, in one.

    A subclass has `batch_size`, the windows or sentences per forward, which becomes smaller where the memory does not
    suffice for so many.
    """

    batch_size: Any  # an int, once a predictor is made
    streams: Any = 1  # an int: how many threads may call `start` at once
    on_gpu = False  # whether `start` returns before all is computed

    def prepare(self, image: np.ndarray) -> Any:
        """Return a `Prepared` of an image (H,W,3), as `read_image` returns it: resizing, which needs no model."""
        raise NotImplementedError

    def kind(self, prepared: Any) -> Hashable:
        """Return what images that may share a forward have in common."""
        return prepared.size, tuple((view.shape, view.dtype) for view in prepared.views)

    def forwards(self, prepared: Any) -> int:
        """Return how many entries of a batch an image takes: its windows and their mirror images, or its sentences."""
        raise NotImplementedError

    def start(self, group: Sequence[Any]) -> Callable[[], Sequence[R | ImageError]]:
        """Begin to predict on images of one kind. Returns what waits for the results: one for each image, or its error.

        A GPU computes meanwhile; on a CPU all is done when this returns.
        """
        raise NotImplementedError

    def __call__(self, image: np.ndarray) -> R:
        """Predict on an RGB image (H,W,3) as `read_image` returns it. Raises ImageError for NaN and infinity."""
        (result,) = launch(self, [self.prepare(image)])()
        if isinstance(result, Exception):
            raise result
        return result


class OneByOne(BatchPredictor[R]):
    """A function of images, `predict(image) -> result`, as a predictor whose images share nothing."""

    batch_size = 1

    def __init__(self, predict: Callable[[np.ndarray], R]) -> None:
        self._predict = predict

    def prepare(self, image: np.ndarray) -> Prepared:
        """Return the image as it is."""
        return Prepared(image, ())

    def kind(self, prepared: Any) -> Hashable:
        """Return nothing: all are alone."""
        return ()

    def forwards(self, prepared: Any) -> int:
        """Return 1."""
        return 1

    def start(self, group: Sequence[Any]) -> Callable[[], Sequence[R | ImageError]]:
        """Call the function."""
        results = [self._predict(prepared.image) for prepared in group]
        return lambda: results


def launch(predictor: BatchPredictor[R], group: Sequence[Any]) -> Callable[[], list[R | Exception]]:
    """Do what `predictor.start(group)` does, but let no image spoil the others.

    Where memory does not suffice, half as many are tried, down to one window of one image, whose error it then is. The
    smaller batch is kept if it was of help. Other errors than those of images are raised.
    """
    try:
        wait = predictor.start(group)
    except (ImageError, InputError, *OUT_OF_MEMORY) as error:
        results = _apart(predictor, group, error)
        return lambda: results

    def finish() -> list[R | Exception]:
        try:
            return [*wait()]
        except (ImageError, InputError, *OUT_OF_MEMORY) as error:
            return _apart(predictor, group, error)

    return finish


def _apart(predictor: BatchPredictor[R], group: Sequence[Any], error: Exception) -> list[R | Exception]:
    """Return the results of the halves of a group that failed together, or the error of its only image."""
    full = predictor.batch_size
    lacking = isinstance(error, OUT_OF_MEMORY)
    traceback.clear_frames(error.__traceback__)  # which hold what did not fit
    if len(group) == 1 and not (lacking and full > 1):
        return [ImageError(TOO_LARGE) if lacking else error]
    if lacking:
        predictor.batch_size = max(full // 2, 1)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    half = -(-len(group) // 2)
    results: list[R | Exception] = []
    for part in (group[:half], group[half:]):
        results += launch(predictor, part)() if part else []
    if lacking and all(isinstance(result, Exception) for result in results):
        predictor.batch_size = full  # it is these images that are too large
    return results


def stacked(views: Iterable[np.ndarray], device: torch.device) -> Tensor:
    """Return images (h,w,3) of one size and dtype as a batch (n,3,h,w) float32 in [0,1] on a device; bytes travel there
    as bytes."""
    pixels = torch.from_numpy(np.stack(list(views)))
    if device.type == "cuda":
        pixels = pixels.pin_memory().to(device, non_blocking=True)
    planes = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    return planes.div_(255) if pixels.dtype == torch.uint8 else planes
