"""A model measured on a data set, in one process or in several."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from vpd_fast.data.sample import failure, load_sample, notes_of
from vpd_fast.errors import DatasetError, ImageError, InputError, VPDFastError
from vpd_fast.evaluation.distributed import check_group, gather
from vpd_fast.evaluation.gallery import Case, Worst
from vpd_fast.evaluation.metrics import PRIMARY
from vpd_fast.evaluation.results import Evaluation, show
from vpd_fast.evaluation.tasks import Segmentation, make_task
from vpd_fast.inference.pipeline import Failure, Outcome, outcomes
from vpd_fast.inference.predict_images import TOO_LARGE, model_error, together
from vpd_fast.progress import ProgressBar

if TYPE_CHECKING:
    from vpd_fast.data import Dataset
    from vpd_fast.evaluation.tasks import Depth, Finding, Ready, Referring
    from vpd_fast.models.perceiver import Perceiver

# (samples done, samples in all, metrics so far) of this process.
Progress = Callable[[int, int, dict[str, float]], None]

# What a model may raise about one sample; whatever reading raises is one of ours, see `load_sample`.
SAMPLE_ERRORS = (ImageError, DatasetError, MemoryError, torch.OutOfMemoryError)


@dataclass
class _Part:
    """The findings of one process."""

    metrics: Any
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    count: int = 0
    seconds: float = 0.0
    error: str | None = None


def evaluate(
    model: Perceiver,
    dataset: Dataset,
    *,
    limit: int | None = None,
    batch_size: int | str | None = None,
    progress: bool | Progress = False,
    rank: int = 0,
    world_size: int = 1,
    text_encoder: Any = None,
    strict: bool = False,
    workers: int = 2,
    worst: int = 12,
    **options: Any,
) -> Evaluation:
    """Measure `model` (plain or fast, in whatever mode; it is put back) on `dataset`.

    limit: only the first so many samples. batch_size: windows or sentences per forward, also of several samples
    of one size, or "auto"; default 1 on a CPU, 8 on a GPU.
    progress: True shows a bar with the metric so far on stderr; a function is called after each sample.
    rank, world_size: with several processes, each with torch.distributed initialised, this one measures the samples
    rank, rank + world_size, ...; each gets the same result, which is that of a single process: counts are integers,
    and sums are rounded once.
    text_encoder: for referring models, a vpd_fast.models.text.TextEncoder or a function from a list of sentences to
    token features (sentences, tokens, context_dim).
    strict: raise the error of the first broken sample instead of going on without it.
    workers: threads that read the next samples while the model works; 0: none.
    worst: how many of the worst cases to keep pictures of.
    options: segmentation: mode, resize_to, scales, flip. referring: resolution ("resized" as in the reference, or
    "original"). depth: resize_to, shift_window, flip, scene ("sample", None or one of the model's), crop, min_depth,
    max_depth; see vpd_fast.evaluation.tasks. All: streams, the batches that a CPU computes at once. The defaults are
    the published evaluation, single scale.

    Raises InputError for wrong options and if data set and model are of different tasks or classes; DatasetError if
    nothing could be measured, or in another process something was raised; ModelError, which names the sample, for what
    the model or its GPU raises in the middle.
    """
    check_group(rank, world_size)
    for name, value, least in (("limit", limit, 1), ("workers", workers, 0), ("worst", worst, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise InputError(f"{name} must be an int of at least {least}, got {value!r}")
    task = make_task(model, dataset, text_encoder=text_encoder, batch_size=batch_size, **options)
    total = len(dataset) if limit is None else min(limit, len(dataset))
    if not total:
        raise DatasetError("the data set is empty; expected at least one sample")
    part, cases = _Part(task.metrics), Worst(worst)
    error: Exception | None = None
    try:
        indices = range(rank, total, world_size)
        with _reporting(len(indices), PRIMARY[model.config.task][0], progress) as report:
            _run(dataset, task, indices, part, cases, report, strict, workers)
    except Exception as raised:  # the others wait for this process: tell them before it is raised
        error, part.error = raised, f"{type(raised).__name__}: {raised}"
        if world_size == 1:
            raise
    parts = gather(part, world_size)
    if error is not None:
        raise error
    stopped = next(((i, other.error) for i, other in enumerate(parts) if other.error), None)
    if stopped is not None:
        raise DatasetError(f"the evaluation stopped in process {stopped[0]} of {world_size}: {stopped[1]}")
    return _merged(model, dataset, task, parts, _worst_of_all(cases, world_size), total)


@contextmanager
def _reporting(total: int, metric: str, progress: bool | Progress) -> Iterator[Progress]:
    """Yield the function to call after each sample: the caller's, or one that moves a bar with the metric so far."""
    if not isinstance(progress, bool):
        yield progress
        return
    with ProgressBar(total, metric, visible=None if progress else False) as bar:
        yield lambda done, _, metrics: bar.update(done, f"{metric} {show(metric, metrics[metric])}")


def _run(
    dataset: Dataset,
    task: Segmentation | Referring | Depth,
    indices: range,
    part: _Part,
    cases: Worst,
    report: Progress,
    strict: bool,
    workers: int,
) -> None:
    """Measure the samples of one process into `part` and `cases`."""
    start = time.perf_counter()
    primary = PRIMARY[dataset.task][0]
    score = "IoU" if primary == "oIoU" else primary  # of one image or sentence
    found = outcomes(
        indices,
        partial(_read, dataset, task),
        task,
        ahead=workers and max(workers, 2 * task.batch_size),
        threads=workers,
    )
    with closing(found):
        try:
            for done, outcome in enumerate(found, 1):
                _add(dataset, task, outcome, part, cases, score, strict)
                report(done, len(indices), task.metrics.compute())
        except Failure as failed:  # the next sample would fare no better
            names = [dataset.name(index) for index in failed.items]
            raise model_error(failed.cause, together(names)) from failed.cause
    part.seconds = time.perf_counter() - start


def _add(
    dataset: Dataset,
    task: Segmentation | Referring | Depth,
    outcome: Outcome[int, Any],
    part: _Part,
    cases: Worst,
    score: str,
    strict: bool,
) -> None:
    """Measure a sample on which the model has predicted, or note why it did not."""
    index, error = outcome.item, outcome.result
    findings: list[Finding] = []
    if not isinstance(error, Exception):
        try:
            findings = task.measure(outcome.value, outcome.result)
        except SAMPLE_ERRORS as raised:
            error = raised
        except Exception as raised:
            raise model_error(raised, outcome.value.sample.name) from raised
    if isinstance(error, Exception):
        if strict or (error is not outcome.value and not isinstance(error, SAMPLE_ERRORS)):
            raise error
        name, message = failure(dataset, index, error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            message = TOO_LARGE
        part.failed.append({"index": index, "name": name, "error": message})
        return
    name = outcome.value.sample.name
    if findings:
        part.count += 1
    else:
        part.left_out.append({"index": index, "name": name})
    for number, finding in enumerate(findings):
        part.rows.append({"index": index, "name": name, **finding.row})
        cases.offer(index, number, name, f"{score} {show(score, finding.row[score])}", finding)


def _read(dataset: Dataset, task: Segmentation | Referring | Depth, index: int) -> Ready | Exception:
    """Return a sample, prepared for the model, or why it was not read."""
    sample = load_sample(dataset, index)
    if isinstance(sample, VPDFastError):
        return sample
    try:
        return task.prepare(sample)
    except SAMPLE_ERRORS as error:
        return error
    except Exception as error:
        raise model_error(error, sample.name) from error


def _worst_of_all(cases: Worst, world_size: int) -> list[Case]:
    """Return the worst cases of all processes; only the pictures of those travel."""
    keys = sorted(key for keys in gather([case.key for case in cases.cases], world_size) for key in keys)
    chosen = set(keys[: cases.count])
    mine = [case for case in cases.cases if case.key in chosen]
    return sorted((case for part in gather(mine, world_size) for case in part), key=lambda case: case.key)


def _merged(
    model: Perceiver,
    dataset: Dataset,
    task: Segmentation | Referring | Depth,
    parts: list[_Part],
    worst: list[Case],
    total: int,
) -> Evaluation:
    metrics = parts[0].metrics
    for part in parts[1:]:
        metrics.merge(part.metrics)
    task.metrics = metrics
    failed, left_out, rows = (
        sorted((row for part in parts for row in getattr(part, name)), key=lambda row: row["index"])
        for name in ("failed", "left_out", "rows")
    )
    count = sum(part.count for part in parts)
    notes = [f"data set: {note}" for note in notes_of(dataset)] + task.notes()
    if not count:
        first = f"{failed[0]['name']}: {failed[0]['error']}" if failed else f"{left_out[0]['name']} has no valid pixel"
        notes.insert(0, f"none of the {total} samples could be measured; the first: {first}")
        raise DatasetError("; ".join(notes))
    if left_out:
        notes.append(f"{len(left_out)} of {total} images have no labelled pixel and count nowhere")
    if failed:
        notes.append(f"{len(failed)} of {total} samples failed and are missing in the metrics")
    if total < len(dataset):
        notes.append(f"only the first {total} of {len(dataset)} samples were measured")
    per_class = metrics.per_class(task.names) if isinstance(task, Segmentation) else []
    seconds = max(part.seconds for part in parts)
    return Evaluation(
        model.config.task, metrics.compute(), per_class, rows, count, failed, left_out, task.settings, notes, seconds,
        worst,
    )  # fmt: skip
