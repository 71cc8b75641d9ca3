"""What evaluation does with one sample, by task: predict, measure, and tell how to draw it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vpd_fast.data.survey import depth_notes, label_notes
from vpd_fast.errors import DatasetError, InputError
from vpd_fast.evaluation import panels
from vpd_fast.evaluation.metrics import DepthMetrics, ReferringMetrics, SegmentationMetrics
from vpd_fast.inference import DepthPredictor, ReferringPredictor, SegmentationPredictor, make_predictor
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


class Segmentation:
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

    def measure(self, sample: Sample) -> list[Finding]:
        """Return one finding, or none if no pixel has a label."""
        labels = self._predictor(sample.image).labels
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


class Referring:
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
        known = ("batch_size",)
        unknown = [name for name in options if name not in known]
        if unknown:
            raise InputError(f"evaluation of referring has no option {', '.join(unknown)}; known: {', '.join(known)}")
        self._model: Any = model
        self._encoder, self._options = text_encoder, options
        self._resized = resolution == "resized"
        self.metrics = ReferringMetrics()
        self.settings = {"resolution": resolution, "base_size": model.config.base_size, **options}

    def measure(self, sample: Sample) -> list[Finding]:
        """Return a finding per sentence."""
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
        predictor = ReferringPredictor(
            model=self._model, text=sentences, tokens=self._embed(sentences), **self._options
        )
        masks = predictor(image).masks
        notes = truncation_notes(self._encoder, sentences=sentences, tokens=self._model.config.tokens)
        self.metrics.truncated += len(notes)
        findings = []
        for number, (sentence, mask) in enumerate(zip(sentences, masks, strict=True)):
            row = {"sentence": sentence, "number": number, **self.metrics.update(mask, target)}
            findings.append(
                Finding(row, 1 - row["IoU"], partial(panels.referring, sample.image, mask, target, sentence))
            )
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


class Depth:
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
        self._plain = predictor
        self._predictors: dict[int, DepthPredictor] = {}
        max_depth = model.config.max_depth if max_depth is None else max_depth
        self.metrics = DepthMetrics(min_depth, max_depth, crop)
        self.settings = {
            **_settings(self._plain, "resize_to", "shift_window", "flip", "batch_size"),
            "scene": scene, "crop": crop, "min_depth": self.metrics.min_depth, "max_depth": self.metrics.max_depth,
        }  # fmt: skip

    def measure(self, sample: Sample) -> list[Finding]:
        """Return one finding, or none if no pixel is valid."""
        if not self.metrics.valid(sample.target).any():
            self.metrics.count(sample.target)
            return []
        depth = self._predictor(sample)(sample.image).depth
        row = self.metrics.update(depth, sample.target)
        assert row is not None
        valid = self.metrics.valid(sample.target)
        draw = partial(panels.depth, sample.image, depth, sample.target, valid)
        return [Finding(row, row["rmse"], draw)]

    def _predictor(self, sample: Sample) -> DepthPredictor:
        scene = sample.scene
        if not self._by_sample or scene is None:
            return self._plain
        if not 0 <= scene < self._scenes:
            raise DatasetError(f"{sample.name}: scene {scene}; expected 0 to {self._scenes - 1}, the model's scenes")
        if scene not in self._predictors:
            self._predictors[scene] = replace(self._plain, scene=scene)
        return self._predictors[scene]

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
    model: Perceiver, dataset: Dataset, *, text_encoder: Any = None, batch_size: int | None = None, **options: Any
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
