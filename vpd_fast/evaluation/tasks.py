"""What evaluation does with one sample, by task: predict, measure, and tell how to draw it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from vpd_fast.data.survey import depth_notes, label_notes
from vpd_fast.errors import DatasetError, InputError
from vpd_fast.evaluation import panels
from vpd_fast.evaluation.metrics import DepthMetrics, ReferringMetrics, SegmentationMetrics
from vpd_fast.inference import DepthPredictor, ReferringPredictor, SegmentationPredictor, make_predictor
from vpd_fast.inference.batching import BatchPredictor, Prepared, launch
from vpd_fast.inference.running import named_encoder, truncation_notes
from vpd_fast.labels import default_names
from vpd_fast.pictures.resizing import resize_antialiased

if TYPE_CHECKING:
    from vpd_fast.data import Dataset, Sample
    from vpd_fast.models.perceiver import Perceiver

RESOLUTIONS = ("resized", "original")


@dataclass(frozen=True)
class Finding:
    """One row of the table. badness: the larger, the worse. draw: makes the pictures, called for the worst only."""

    row: dict[str, Any]
    badness: float
    draw: Callable[[], panels.Drawing]


@dataclass(frozen=True)
class Ready:
    """A sample, and what the predictor takes of it; None: there is nothing to compare with, so nothing to predict.

    target: what predictions are compared with. given: the sentences of a referring sample.
    """

    sample: Sample
    prepared: Prepared | None
    target: np.ndarray
    given: tuple[str, ...] = ()


class _Task(BatchPredictor[Any]):
    """Base of the tasks: samples are prepared in any thread, predicted in batches, and measured in order."""

    _predictor: Any  # of the model's task

    @property
    def batch_size(self) -> int:
        """Windows or sentences per forward, which become fewer where memory does not suffice."""
        return self._predictor.batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        self._predictor.batch_size = value

    @property
    def streams(self) -> int:
        """Batches that a CPU computes at once."""
        return self._predictor.streams

    @property
    def on_gpu(self) -> bool:
        """Whether results come later."""
        return self._predictor.on_gpu

    def prepare(self, sample: Sample) -> Ready:
        """Resize the image of a sample. Raises DatasetError for one that is not right."""
        check_sample(sample)
        return Ready(sample, self._predictor.prepare(sample.image), sample.target)

    def kind(self, ready: Ready) -> Hashable:
        """Return the predictor's kind of the image."""
        return None if ready.prepared is None else self._predictor.kind(ready.prepared)

    def forwards(self, ready: Ready) -> int:
        """Return the predictor's number."""
        return 1 if ready.prepared is None else self._predictor.forwards(ready.prepared)

    def start(self, group: Sequence[Ready]) -> Callable[[], Sequence[Any]]:
        """Begin to predict on samples of one kind."""
        images = [ready.prepared for ready in group if ready.prepared is not None]
        return self._predictor.start(images) if images else lambda: [NOTHING] * len(group)

    def measure(self, ready: Ready, result: Any) -> list[Finding]:
        """Return what there is to say of the prediction on a sample."""
        raise NotImplementedError

    def findings(self, sample: Sample) -> list[Finding]:
        """Predict on one sample and measure it. Raises ImageError and DatasetError."""
        ready = self.prepare(sample)
        (result,) = launch(self, [ready])()
        if isinstance(result, Exception):
            raise result
        return self.measure(ready, result)


NOTHING = object()  # the result of samples that have nothing to predict


class Segmentation(_Task):
    """Compares labels of the predictor, the reference's test pipeline, with the labels at the image's own size."""

    def __init__(self, model: Perceiver, dataset: Dataset, text_encoder: Any, **options: Any) -> None:
        self.names = tuple(dataset.class_names) or default_names(model.config)
        if len(self.names) != model.config.num_classes:
            raise InputError(
                f"the model has {model.config.num_classes} classes, the data set {len(self.names)}; "
                "expected the same classes"
            )
        predictor = make_predictor(model, text_encoder=text_encoder, **options)
        assert isinstance(predictor, SegmentationPredictor)
        self._predictor = predictor
        self.metrics = SegmentationMetrics(model.config.num_classes)
        self.settings = _settings(self._predictor, "mode", "resize_to", "scales", "flip", "batch_size")

    def measure(self, ready: Ready, result: Any) -> list[Finding]:
        """Return one finding, or none if no pixel has a label."""
        sample, labels = ready.sample, result.labels
        try:
            row = self.metrics.update(labels, sample.target)
        except InputError as error:  # the model's labels are right by construction
            raise DatasetError(f"{sample.name}: {error}") from error
        if row is None:
            return []
        draw = partial(panels.segmentation, sample.image, labels, sample.target, self.names)
        return [Finding(row, 1 - row["mIoU"], draw)]

    def notes(self) -> list[str]:
        """Return what whoever reads the numbers must know."""
        labels = label_notes(self.names, self.metrics.labelled, self.metrics.ignored)
        return [*self._predictor.notes, *labels]


class Referring(_Task):
    """Compares the masks of a sample's sentences, which share one pass of the encoder.

    resolution: "resized", as in the reference: masks and labels are compared at base_size x base_size, the labels
    resized without interpolation. "original": the logits are resized to the image's size.
    text_encoder: has embed_sentences(sentences, tokens=), or is called with the list of sentences; returns (sentences,
    tokens, context_dim).
    """

    def __init__(
        self, model: Perceiver, dataset: Dataset, text_encoder: Any, resolution: str = "resized", **options: Any
    ) -> None:
        if resolution not in RESOLUTIONS:
            raise InputError(f"resolution must be one of {', '.join(RESOLUTIONS)}, got {resolution!r}")
        text_encoder = text_encoder or named_encoder(model)
        if text_encoder is None:
            raise InputError("a referring model needs text_encoder=, which turns sentences into token features")
        known = ("batch_size", "streams")
        unknown = [name for name in options if name not in known]
        if unknown:
            raise InputError(f"evaluation of referring has no option {', '.join(unknown)}; known: {', '.join(known)}")
        self._model: Any = model
        self._encoder = text_encoder
        config = model.config
        unused = torch.zeros(1, config.tokens, config.backbone.context_dim)
        self._predictor = ReferringPredictor(model=self._model, tokens=unused, **options)
        self._resized = resolution == "resized"
        self.metrics = ReferringMetrics()
        self.settings = {"resolution": resolution, "base_size": config.base_size, **options}

    def prepare(self, sample: Sample) -> Ready:
        """Resize the image of a sample, and check its sentences. Raises DatasetError."""
        check_sample(sample)
        given: Any = sample.sentences  # a data set of one's own may have one text
        sentences: list[str] = [given] if isinstance(given, str) else list(given)
        if not sentences or not all(isinstance(s, str) and s.strip() for s in sentences):
            raise DatasetError(
                f"{sample.name}: the sentences are {sample.sentences!r}; expected at least one, none empty"
            )
        image, target = sample.image, sample.target.astype(bool)
        if self._resized:  # the predictor then resizes neither the image nor its logits
            side = self._model.config.base_size
            image, target = resize_antialiased(image, (side, side)), _resize_nearest(target, (side, side))
        return Ready(sample, self._predictor.prepare(image), target, tuple(sentences))

    def forwards(self, ready: Ready) -> int:
        """Return the number of sentences."""
        return len(ready.given)

    def start(self, group: Sequence[Ready]) -> Callable[[], Sequence[Any]]:
        """Embed the sentences, and begin to predict."""
        asked = []
        for ready in group:
            assert ready.prepared is not None
            query = self._predictor.query(ready.given, self._embed(list(ready.given)))
            asked.append(replace(ready.prepared, given=query))
        return self._predictor.start(asked)

    def measure(self, ready: Ready, result: Any) -> list[Finding]:
        """Return a finding per sentence."""
        notes = truncation_notes(self._encoder, sentences=ready.given, tokens=self._model.config.tokens)
        self.metrics.truncated += len(notes)
        findings = []
        for number, (sentence, mask) in enumerate(zip(ready.given, result.masks, strict=True)):
            row = {"sentence": sentence, "number": number, **self.metrics.update(mask, ready.target)}
            draw = partial(panels.referring, ready.sample.image, mask, ready.target, sentence)
            findings.append(Finding(row, 1 - row["IoU"], draw))
        return findings

    def _embed(self, sentences: list[str]) -> Any:
        if hasattr(self._encoder, "embed_sentences"):
            return self._encoder.embed_sentences(sentences, tokens=self._model.config.tokens)
        return self._encoder(sentences)

    def notes(self) -> list[str]:
        """Return what whoever reads the numbers must know."""
        count, tokens = self.metrics.truncated, self._model.config.tokens
        if not count:
            return []
        return [
            f"{count} of {self.metrics.sentences} sentences have more than {tokens} tokens; their ends are left out"
        ]


class Depth(_Task):
    """Compares depth of the predictor (shifted windows, mirror images) with the true depth at the image's own size.

    scene: "sample" takes each sample's scene, None the mean of all scenes, else one of the model's for all.
    crop, min_depth, max_depth: as in DepthMetrics; max_depth is the model's by default.
    """

    def __init__(
        self,
        model: Perceiver,
        dataset: Dataset,
        text_encoder: Any,
        scene: str | int | None = "sample",
        crop: str = "eigen",
        min_depth: float = 1e-3,
        max_depth: float | None = None,
        **options: Any,
    ) -> None:
        self._scenes = model.config.num_scenes
        self._by_sample = scene == "sample"
        if self._by_sample and len(dataset.class_names) > self._scenes:
            raise InputError(
                f"the model has {self._scenes} scenes, the data set {len(dataset.class_names)}; "
                'expected the same scenes, or scene=None for their mean instead of "sample"'
            )
        predictor = make_predictor(model, scene=None if self._by_sample else scene, **options)
        assert isinstance(predictor, DepthPredictor)
        self._predictor = predictor
        max_depth = model.config.max_depth if max_depth is None else max_depth
        self.metrics = DepthMetrics(min_depth, max_depth, crop)
        self.settings = {
            **_settings(self._predictor, "resize_to", "shift_window", "flip", "batch_size"),
            "scene": scene, "crop": crop, "min_depth": self.metrics.min_depth, "max_depth": self.metrics.max_depth,
        }  # fmt: skip

    def prepare(self, sample: Sample) -> Ready:
        """Resize the image of a sample, and look up its scene. Raises DatasetError."""
        check_sample(sample)
        scene = sample.scene if self._by_sample else None
        if scene is not None and not 0 <= scene < self._scenes:
            raise DatasetError(f"{sample.name}: scene {scene}; expected 0 to {self._scenes - 1}, the model's scenes")
        valid = self.metrics.valid(sample.target).any()
        return Ready(sample, self._predictor.prepare(sample.image, scene) if valid else None, sample.target)

    def measure(self, ready: Ready, result: Any) -> list[Finding]:
        """Return one finding, or none if no pixel is valid."""
        sample = ready.sample
        if result is NOTHING:
            self.metrics.count(sample.target)
            return []
        row = self.metrics.update(result.depth, sample.target)
        assert row is not None
        valid = self.metrics.valid(sample.target)
        draw = partial(panels.depth, sample.image, result.depth, sample.target, valid)
        return [Finding(row, row["rmse"], draw)]

    def notes(self) -> list[str]:
        """Return what whoever reads the numbers must know."""
        metrics = self.metrics
        notes = depth_notes(metrics.known, metrics.measured, metrics.farthest, metrics.min_depth, metrics.max_depth)
        if metrics.uncropped:
            notes.append(
                f"the Eigen crop is for images of 480x640 pixels; {metrics.uncropped} of {metrics.images} were "
                "measured whole"
            )
        return notes


_TASKS = {"segmentation": Segmentation, "referring": Referring, "depth": Depth}


def make_task(
    model: Perceiver, dataset: Dataset, *, text_encoder: Any = None, batch_size: int | str | None = None, **options: Any
) -> Segmentation | Referring | Depth:
    """Make the task of `model`, its options checked. Raises InputError if the data set is of another task."""
    task = model.config.task
    if dataset.task != task:
        raise InputError(f"the data set is for {dataset.task}, the model for {task}; expected the same task")
    if batch_size is not None:
        options["batch_size"] = batch_size
    return _TASKS[task](model, dataset, text_encoder, **options)


def check_sample(sample: Sample) -> None:
    """Raise DatasetError, naming the sample, unless image and target have one size."""
    if sample.image.shape[:2] != sample.target.shape:
        raise DatasetError(
            f"{sample.name}: the image has {sample.image.shape[:2]} pixels (height, width), its labels "
            f"{sample.target.shape}; expected the same size"
        )


def _settings(predictor: Any, *names: str) -> dict[str, Any]:
    known: Sequence[str] = [field.name for field in fields(predictor)]
    return {name: getattr(predictor, name) for name in names if name in known}


def _resize_nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a mask as Pillow does without interpolation, which is what torchvision does to palette images."""
    picture = Image.fromarray(mask.astype(np.uint8))
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.NEAREST)).astype(bool)
