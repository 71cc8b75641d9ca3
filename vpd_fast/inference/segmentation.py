"""Semantic segmentation of images of any size: sliding windows or the whole image, several scales, flips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vpd_fast.config import SIZE_MULTIPLE
from vpd_fast.errors import ImageError, InputError
from vpd_fast.inference.batching import BatchPredictor, Prepared, stacked
from vpd_fast.inference.finite import NOT_FINITE, FiniteCheck, Transfer
from vpd_fast.inference.results import AttentionMaps, SegmentationResult
from vpd_fast.inference.running import (
    batch_size_for,
    evaluating,
    named_encoder,
    run_batches,
    streams_for,
    truncation_notes,
)
from vpd_fast.inference.windows import WindowField, WindowGrid, check_pair, strips
from vpd_fast.labels import default_names
from vpd_fast.pictures.resizing import LONG_OVER_SHORT, fit_size, resize_bilinear

if TYPE_CHECKING:
    from torch import Tensor

    from vpd_fast.models.perceiver import SegmentationPerceiver


def slide_inference(
    model: SegmentationPerceiver,
    image: Tensor,
    crop_size: int | tuple[int, int],
    stride: int | tuple[int, int],
    out_size: tuple[int, int] | None = None,
    flip: str | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Return class probabilities (B, num_classes, *out_size) by sliding windows, as the reference's mode "slide" does.

    image: (B,3,H,W) in [-1,1], any size, on the model's device and of its dtype. crop_size, stride: int or (height,
    width). Windows are averaged as logits at the image's size, resized bilinearly to out_size (default: the image's
    size), then softmax.
    flip: None, "horizontal" or "vertical": the image given is flipped this way, and the probabilities are flipped back.
    batch_size: windows per forward; default 1 on a CPU, 8 on a GPU.

    Windows whose size is not a multiple of 64 (images smaller than the crop) are padded with grey at the right and
    bottom and the padding's logits are cut off; the reference fails there. Raises InputError, and ImageError for logits
    that are not finite.
    """
    if model.config.task != "segmentation":
        raise InputError(f"slide_inference needs a segmentation model, got a {model.config.task} model")
    if not isinstance(image, torch.Tensor) or image.dim() != 4 or image.shape[1] != 3 or 0 in image.shape:
        came = tuple(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
        raise InputError(f"image must be a tensor of shape (B, 3, H, W), got {came}")
    if flip not in (None, "horizontal", "vertical"):
        raise InputError(f'flip must be None, "horizontal" or "vertical", got {flip!r}')
    crop, step = check_pair("crop_size", crop_size), check_pair("stride", stride)
    if step[0] > crop[0] or step[1] > crop[1]:
        raise InputError(
            f"stride {step} must not exceed crop_size {crop}: pixels between windows would have no prediction"
        )
    height, width = image.shape[2:]
    out = (height, width) if out_size is None else check_pair("out_size", tuple(out_size))
    grid, check = WindowGrid.sliding((height, width), crop, step), FiniteCheck()
    with evaluating(model):
        probabilities = torch.empty(image.shape[0], model.config.num_classes, *out, device=image.device)
        for i in range(image.shape[0]):
            batches = grid.batches(image[i : i + 1], batch_size_for(model, batch_size))
            logits, _ = run_batches(model, batches, model.extract_feat, False)
            check.see(logits[None])
            field = grid.field(logits, out, flip)
            for first, last in strips(field.channels, out):
                probabilities[i, :, first:last] = field.strip(first, last).softmax(0)
        if image.shape[0] and check.verdict().item() != 0:
            raise ImageError(NOT_FINITE)
    return probabilities


@dataclass(kw_only=True)
class SegmentationPredictor(BatchPredictor[SegmentationResult]):
    """Predictor of segmentation: its options, checked, and the call that predicts on one image.

    mode: "slide" is the reference's test pipeline: the image resized, ratio kept, to fit 4 x `resize_to` by `resize_to`
        pixels, windows of base_size every two thirds of it. "whole": one forward, both sides resized to multiples of
        64.
    resize_to: short side in pixels; default base_size.
    scales: sizes relative to resize_to whose probabilities are averaged; the reference's multi-scale test has
        1.0, 1.125, 1.25, 1.375 and 1.5.
    flip: average with the mirrored image, at every scale.
    classes, text_encoder: own class names, one per class of the model, in place of the embeddings it has.
    probabilities: keep the class probabilities at the image's size: 4 bytes x classes x pixels.
    with_maps: keep the cross-attention maps, one per class.
    batch_size: windows per forward, also of several images; default 1 on a CPU, 8 on a GPU.
    streams: batches that a CPU computes at once, each with a share of the threads; default 1, for small fast models up
        to 8.

    notes: what whoever sees the results must know: words of class names that the text encoder cuts off.
    """

    model: SegmentationPerceiver
    mode: str = "slide"
    resize_to: int | None = None
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    classes: Sequence[str] | None = None
    text_encoder: Any = None
    probabilities: bool = False
    with_maps: bool = False
    batch_size: int | str | None = None
    streams: int | None = None

    def __post_init__(self) -> None:
        config = self.model.config
        if self.mode not in ("slide", "whole"):
            raise InputError(f'mode must be "slide" or "whole", got {self.mode!r}')
        self._short = check_pair("resize_to", config.base_size if self.resize_to is None else self.resize_to)[0]
        self.resize_to = self._short
        scales = [self.scales] if isinstance(self.scales, int | float) else list(self.scales)
        if not scales or not all(isinstance(s, int | float) and 0 < s <= 16 for s in scales):
            raise InputError(f"scales must be numbers in (0, 16], at least one, got {self.scales!r}")
        self.scales = scales
        self.batch_size = batch_size_for(self.model, self.batch_size)
        self.streams = streams_for(self.model, self.streams)
        self.on_gpu = self.model.device.type == "cuda"
        self.class_names = default_names(config) if self.classes is None else self._checked_classes(self.classes)
        self._embeddings = self.model.conditioning.class_embeddings if self.classes is None else self._embed_classes()
        self.notes = [] if self.classes is None else truncation_notes(self.text_encoder, classes=self.class_names)

    def _checked_classes(self, classes: Sequence[str]) -> tuple[str, ...]:
        count = self.model.config.num_classes
        if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
            raise InputError(f"classes must be a list of names, got {classes!r}")
        if len(set(classes)) < len(classes):
            raise InputError(f"classes must not repeat a name, got {classes!r}")
        if len(classes) != count:
            raise InputError(
                f"classes has {len(classes)} names, but the model's head was trained for {count} classes; "
                f"expected {count} names"
            )
        self.text_encoder = self.text_encoder or named_encoder(self.model)
        if self.text_encoder is None:
            raise InputError("classes needs text_encoder=, a vpd_fast.models.text.TextEncoder, to embed the names")
        return tuple(classes)

    def _embed_classes(self) -> Tensor:
        embeddings = self.text_encoder.embed_classes(list(self.class_names))
        expected = tuple(self.model.conditioning.class_embeddings.shape)
        if tuple(embeddings.shape) != expected:
            raise InputError(
                f"text_encoder gave class embeddings {tuple(embeddings.shape)}, the model needs {expected}"
            )
        return embeddings.to(self.model.device, self.model.dtype)

    def prepare(self, image: np.ndarray) -> Prepared:
        """Resize an image (H,W,3) to every scale."""
        sizes = (self._size(image.shape[:2], scale) for scale in self.scales)
        return Prepared(image, tuple(resize_bilinear(image, size) for size in sizes))

    def forwards(self, prepared: Prepared) -> int:
        """Return the number of windows at the largest scale, and of their mirror images."""
        return max(len(self._grid(view.shape[:2])) for view in prepared.views) * (1 + self.flip)

    def start(self, group: Sequence[Prepared]) -> Callable[[], list[SegmentationResult | ImageError]]:
        """Begin to predict on prepared images of one kind; see `BatchPredictor.start`."""
        size, check = group[0].size, FiniteCheck()
        with evaluating(self.model):
            views, maps = self._views(group, check)
            if len(views) == 1 and not self.probabilities:
                grid, logits, _ = views[0]
                labels, probabilities = grid.labels(logits, size), None
            else:
                found = []
                for i in range(len(group)):
                    found.append(
                        self._average([grid.field(logits[i], size, flip) for grid, logits, flip in views], size)
                    )
                labels = torch.stack([pair[0] for pair in found])
                probabilities = [pair[1] for pair in found]
            if labels.is_cuda:  # fewer bytes to carry
                labels = labels.to(torch.uint8 if self.model.config.num_classes <= 256 else torch.int32)
            transfer = Transfer(check.verdict(), labels)

        def finish() -> list[SegmentationResult | ImageError]:
            verdict, labels = transfer.wait()
            results: list[SegmentationResult | ImageError] = []
            for i, prepared in enumerate(group):
                if verdict[i] != 0:
                    results.append(ImageError(NOT_FINITE))
                    continue
                # Copied where there are several, so that no result keeps the others in memory.
                of_image = labels[i].astype(np.int64, copy=len(group) > 1)
                kept = AttentionMaps(maps[i], self.class_names) if self.with_maps else None
                of_classes = None if probabilities is None else probabilities[i]
                results.append(SegmentationResult(prepared.image, of_image, self.class_names, of_classes, kept))
            return results

        return finish

    def _views(
        self, group: Sequence[Prepared], check: FiniteCheck
    ) -> tuple[list[tuple[WindowGrid, Tensor, str | None]], list[list[WindowField]]]:
        """Return grid, logits (images, windows, C, h, w) and flip of every view, and each image's maps as fields, one
        per view and level."""
        model, size, views = self.model, group[0].size, []
        maps: list[list[WindowField]] = [[] for _ in group]
        context = model.conditioning.text_adapter(self._embeddings, model.conditioning.gamma)
        forward = partial(_features, model, context)
        flips = (None, "horizontal") if self.flip else (None,)
        for scale in range(len(self.scales)):
            images = (stacked((prepared.views[scale] for prepared in group), model.device) * 2 - 1).to(model.dtype)
            grid = self._grid(images.shape[2:])
            batches = grid.batches(
                torch.cat([images, images.flip(3)]) if self.flip else images, int(self.batch_size or 1)
            )
            outputs = run_batches(model, batches, forward, self.with_maps)
            logits, *levels = (
                values.unflatten(0, (len(flips), len(group), len(grid))) for values in (outputs[0], *outputs[1])
            )
            for v, flip in enumerate(flips):
                for values in (logits, *levels):
                    check.see(values[v])
                views.append((grid, logits[v], flip))
                for i in range(len(group)):
                    maps[i] += [grid.field(level[v, i], size, flip).cpu() for level in levels]
        return views, maps

    def _size(self, size: Sequence[int], scale: float) -> tuple[int, int]:
        """Return the height and width to which an image is resized."""
        short, long = int(self._short * scale), int(LONG_OVER_SHORT * self._short * scale)
        height, width = fit_size(size[0], size[1], short, long)
        if self.mode == "whole":
            height, width = (max(round(side / SIZE_MULTIPLE), 1) * SIZE_MULTIPLE for side in (height, width))
        return height, width

    def _grid(self, size: Sequence[int]) -> WindowGrid:
        height, width = size
        if self.mode == "whole":
            return WindowGrid.sliding((height, width), (height, width), (height, width))
        crop = self.model.config.base_size
        return WindowGrid.sliding((height, width), (crop, crop), (crop * 2 // 3, crop * 2 // 3))

    def _average(self, views: list[WindowField], size: tuple[int, int]) -> tuple[Tensor, np.ndarray | None]:
        """Return the labels of the mean of the views' probabilities, and that mean if it was asked for."""
        labels = []
        probabilities = np.empty((views[0].channels, *size), np.float32) if self.probabilities else None
        for first, last in strips(views[0].channels, size):
            mean = views[0].strip(first, last).softmax(0)
            for view in views[1:]:
                mean += view.strip(first, last).softmax(0)
            mean /= len(views)
            labels.append(mean.argmax(0))
            if probabilities is not None:
                probabilities[:, first:last] = mean.cpu().numpy()
        return torch.cat(labels), probabilities


def _features(model: SegmentationPerceiver, context: Tensor, images: Tensor) -> list[Tensor]:
    return model.features(model.encode(images), context.expand(images.shape[0], -1, -1))
