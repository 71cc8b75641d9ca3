"""The three bundled miniatures on scenes they have not seen, as plain and as fast models."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vpd_fast.bundled import NAMES
from vpd_fast.config import CPU_PRECISIONS
from vpd_fast.data.shapes import SPLITS, ShapesDataset
from vpd_fast.data.shapes.dataset import OBJECTS
from vpd_fast.engine import optimize
from vpd_fast.errors import InputError
from vpd_fast.evaluation.metrics import PRIMARY, make_metrics
from vpd_fast.inference import ReferringPredictor, Result, make_predictor
from vpd_fast.models import VPD
from vpd_fast.pictures.reading import to_tensor
from vpd_fast.tasks import TASKS

if TYPE_CHECKING:
    from vpd_fast.data import Sample

ROUNDS, BATCH = 5, 8


@dataclass(frozen=True)
class TaskReport:
    """How accurate, equal and fast a task's plain and fast models are.

    metric: the metric's name; plain, fast: its values. agreement: share of pixels with the same label, IoU of the
    masks, or 1 minus the mean relative difference of depths, between plain and fast. plain_ms, fast_ms: median
    milliseconds per image.
    """

    task: str
    metric: str
    plain: float
    fast: float
    agreement: float
    plain_ms: float
    fast_ms: float

    @property
    def speedup(self) -> float:
        """How many times faster the fast model is."""
        return self.plain_ms / self.fast_ms


@dataclass
class Demo:
    """A finished demo. reports: one per task. shown: for some scenes {task: (sample, result of the fast model)}."""

    precision: str
    scenes: int
    reports: list[TaskReport] = field(default_factory=list)
    shown: list[dict[str, tuple[Sample, Result]]] = field(default_factory=list)


def run_demo(
    scenes: int = 24,
    *,
    split: str = "test",
    first: int = 0,
    precision: str = "int8",
    pictures: int = 4,
    report: Callable[[str], None] = lambda _: None,
) -> Demo:
    """Draw `scenes` scenes of a split, from number `first`, and run the three tasks on them.

    precision: of the fast models. pictures: of how many scenes the results are kept. report: told what is going on.
    Raises InputError, CheckpointError where the weights are missing.
    """
    if scenes < 1 or first < 0 or pictures < 1:
        raise InputError(
            f"a demo needs at least one scene and one picture, from number 0 on, got {scenes}, {pictures} and {first}"
        )
    if split not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if precision not in CPU_PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(CPU_PRECISIONS)}, got {precision!r}")
    demo = Demo(precision, scenes, shown=[{} for _ in range(min(pictures, scenes))])
    with tempfile.TemporaryDirectory(prefix="vpd-fast-demo-") as folder:
        for task, name in zip(TASKS, NAMES, strict=True):
            report(f"{task}: loading {name}")
            model = VPD.from_pretrained(name)
            fast = optimize(model, precision)
            report(f"{task}: {scenes} scenes")
            each = OBJECTS if TASKS[task].takes_text else 1  # samples of a scene, of which the first is taken
            # In one folder, so that scenes are drawn once for all tasks.
            data = ShapesDataset(folder, split, task=task, length=(first + scenes) * each)
            samples = [_with_one_sentence(data.load((first + i) * each), i) for i in range(scenes)]
            demo.reports.append(_run(task, model, fast, samples, demo.shown))
    return demo


def _with_one_sentence(sample: Sample, turn: int) -> Sample:
    """Return the sample with one of its sentences: in turn, as the first are of the easiest kind."""
    if not sample.sentences:
        return sample
    return replace(sample, sentences=(sample.sentences[turn % len(sample.sentences)],))


def _run(
    task: str, model: VPD, fast: Any, samples: list[Sample], shown: list[dict[str, tuple[Sample, Result]]]
) -> TaskReport:
    metrics = [make_metrics(model.config, crop="none") for _ in range(2)]
    agreements = []
    for i, sample in enumerate(samples):
        results = [_predict(m, sample, with_maps=TASKS[task].maps and i < len(shown)) for m in (model, fast)]
        outputs = [result.values.reshape(sample.target.shape) for result in results]  # one sentence, so one mask
        for metric, values in zip(metrics, outputs, strict=True):
            metric.update(values, sample.target)
        agreements.append(_agreement(task, *outputs))
        if i < len(shown):
            shown[i][task] = sample, results[1]
    name = PRIMARY[task][0]
    plain_ms, fast_ms = _times([model, fast], samples)
    plain_value, fast_value = (metric.compute()[name] for metric in metrics)
    return TaskReport(task, name, plain_value, fast_value, float(np.mean(agreements)), plain_ms, fast_ms)


def _predict(model: Any, sample: Sample, with_maps: bool) -> Result:
    options: dict[str, Any] = {"with_maps": True} if with_maps else {}
    if sample.sentences:
        options["text"] = sample.sentences[0]
    return make_predictor(model, **options)(sample.image)


def _agreement(task: str, plain: np.ndarray, fast: np.ndarray) -> float:
    if task == "segmentation":
        return float((plain == fast).mean())
    if task == "referring":
        either = (plain | fast).sum()
        return float((plain & fast).sum() / either) if either else 1.0
    return 1 - float(np.mean(np.abs(fast - plain) / plain))


def _times(models: list[Any], samples: list[Sample]) -> list[float]:
    """Measure milliseconds per image of each model's forward pass on batches, taking turns; median of the rounds."""
    batch = [samples[i % len(samples)] for i in range(BATCH)]
    images = torch.cat([to_tensor(sample.image) for sample in batch])
    inputs: tuple[Tensor, ...] = (images * 2 - 1,)
    if models[0].config.task == "depth":
        inputs = (images, torch.zeros(BATCH, dtype=torch.long))
    elif TASKS[models[0].config.task].takes_text:
        text = [sample.sentences[0] for sample in batch]
        tokens = ReferringPredictor(model=models[0], text=text).tokens
        assert tokens is not None  # the texts have been embedded
        inputs = (*inputs, tokens)
    seconds: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for round_ in range(ROUNDS + 1):
            for model, found in zip(models, seconds, strict=True):
                start = time.perf_counter()
                model(*inputs)
                if round_:  # the first is a warm-up
                    found.append(time.perf_counter() - start)
    return [1000 * statistics.median(found) / BATCH for found in seconds]
