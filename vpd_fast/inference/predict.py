"""One call for all tasks: any image, or a list of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vpd_fast.errors import ImageError, InputError
from vpd_fast.inference.depth import DepthPredictor
from vpd_fast.inference.pipeline import Failure, Outcome, outcomes
from vpd_fast.inference.referring import ReferringPredictor
from vpd_fast.inference.segmentation import SegmentationPredictor
from vpd_fast.pictures.reading import read_image

if TYPE_CHECKING:
    from vpd_fast.inference.results import Result
    from vpd_fast.models.perceiver import Perceiver

PREDICTORS = {"segmentation": SegmentationPredictor, "referring": ReferringPredictor, "depth": DepthPredictor}


def make_predictor(model: Perceiver, **options: Any) -> SegmentationPredictor | ReferringPredictor | DepthPredictor:
    """Return the predictor of the model's task, options checked, texts embedded; call it on arrays of `read_image`.

    Raises InputError for options that the task does not have.
    """
    task = model.config.task
    predictor = PREDICTORS[task]
    known = [field.name for field in fields(predictor) if field.name != "model"]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise InputError(f"{task} has no option {', '.join(unknown)}; its options are {', '.join(known)}")
    return predictor(model=model, **options)


def predict(
    model: Perceiver, source: Any, *, on_error: str = "raise", **options: Any
) -> Result | list[Result] | list[Result | Exception]:
    """Predict on one image, or on each of a list or tuple of images: a result, or a list of results.

    source: whatever `read_image` takes (path, PIL image, array, tensor; any size), or a list of such.
    on_error: "raise", or "return", which puts the error in the place of the result of a list's image that is not
        readable or whose result is not finite.
    options: those of SegmentationPredictor, ReferringPredictor or DepthPredictor, by the model's task.

    Raises ImageError for an unreadable image, naming it, and where the model's output is not finite; InputError for
    wrong options.
    """
    if isinstance(source, list | tuple):
        return list(predict_each(model, source, on_error=on_error, **options))
    _check_on_error(on_error)
    return make_predictor(model, **options)(read_image(source))


def predict_each(
    model: Perceiver, sources: Iterable[Any], *, on_error: str = "raise", **options: Any
) -> Iterator[Result | Exception]:
    """Yield what `predict` returns for each of any iterable, which may be more images than fit into memory.

    With a `batch_size` that takes several images, those of one size are predicted together, and of a list or tuple some
    at once: some more are then read than were asked for.
    """
    _check_on_error(on_error)
    return _results(make_predictor(model, **options), sources, on_error)


def _results(
    predictor: SegmentationPredictor | ReferringPredictor | DepthPredictor, sources: Iterable[Any], on_error: str
) -> Iterator[Result | Exception]:
    def read(numbered: tuple[int, Any]) -> Any:
        i, source = numbered
        try:
            return predictor.prepare(read_image(source, None if isinstance(source, str | Path) else f"source[{i}]"))
        except (ImageError, InputError) as error:
            return error

    streams = None if isinstance(sources, list | tuple) else 1  # of what comes live, no more than asked for is taken
    found: Iterator[Outcome[Any, Any]] = outcomes(
        enumerate(sources), read, predictor, ahead=0, threads=0, streams=streams
    )
    try:
        for outcome in found:
            if isinstance(outcome.result, Exception) and on_error == "raise":
                raise outcome.result
            yield cast("Result | Exception", outcome.result)
    except Failure as failure:
        raise failure.cause from None


def _check_on_error(on_error: str) -> None:
    if on_error not in ("raise", "return"):
        raise InputError(f'on_error must be "raise" or "return", got {on_error!r}')
