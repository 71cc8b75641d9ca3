"""Depth in metres for images of any size: square windows along the long side, averaged with their mirror images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vpd_fast.errors import ImageError
from vpd_fast.inference.batching import BatchPredictor, Prepared, stacked
from vpd_fast.inference.finite import NOT_FINITE, Transfer
from vpd_fast.inference.results import MILLIMETRES, DepthResult, depth_scale
from vpd_fast.inference.running import batch_size_for, evaluating, streams_for
from vpd_fast.inference.windows import WindowAxis, WindowGrid, check_pair
from vpd_fast.labels import default_names, find_name
from vpd_fast.pictures.resizing import LONG_OVER_SHORT, fit_size, resize_area

if TYPE_CHECKING:
    from vpd_fast.models.perceiver import DepthPerceiver

DEPTH_MULTIPLE = 32
RELEASED_SIZE, RELEASED_BASE = 480, 512  # pixels a side in training, and the next size that has whole latents
MID_GREY = 0.5  # 0 in the encoder's [-1, 1], which the reference pads with


def shifted_axis(length: int, side: int) -> WindowAxis:
    """Return windows of `side` pixels along an axis: the fewest that overlap by half, from border to border.

    640 pixels and windows of 480 give the reference's two windows, at 0 and 160. An axis of at most `side` pixels is
    one window.
    """
    size = min(length, side)
    gaps = -(-2 * (length - size) // side)
    starts = tuple(i * (length - size) // max(gaps, 1) for i in range(gaps + 1))
    return WindowAxis(length, starts, size, -(-size // DEPTH_MULTIPLE) * DEPTH_MULTIPLE)


@dataclass(kw_only=True)
class DepthPredictor(BatchPredictor[DepthResult]):
    """Predictor of depth: its options, checked, and the call that predicts on one image.

    scene: name or number of the scene; None: the mean of all scene embeddings.
    resize_to: the image is resized, ratio kept, to this short side (long side at most four times that); default
        base_size, but 480 where that is 512, as the released model was trained; NYUv2's 640x480 stay as they are.
    shift_window: predict on square windows along the long side and average where they overlap; False: on the image as a
        whole.
    flip: average with the mirrored image.
    batch_size: windows per forward, also of several images; default 1 on a CPU, 8 on a GPU.
    streams: batches that a CPU computes at once, each with a share of the threads; default 1, for small fast models up
        to 8.

    notes: what whoever sees the results must know: the scale of the PNGs, if it is not millimetres.

    Shift window and flip are on by default, as in the published evaluation: four forwards for a 4:3 image.
    """

    model: DepthPerceiver
    scene: str | int | None = None
    resize_to: int | None = None
    shift_window: bool = True
    flip: bool = True
    batch_size: int | str | None = None
    streams: int | None = None

    def __post_init__(self) -> None:
        config = self.model.config
        self.batch_size = batch_size_for(self.model, self.batch_size)
        self.streams = streams_for(self.model, self.streams)
        self.on_gpu = self.model.device.type == "cuda"
        default = RELEASED_SIZE if config.base_size == RELEASED_BASE else config.base_size
        self._short = check_pair("resize_to", default if self.resize_to is None else self.resize_to)[0]
        self.resize_to = self._short
        max_depth, scale = config.max_depth, depth_scale(config.max_depth)
        self.notes = [] if scale == MILLIMETRES else [
            f"depths up to {max_depth:g} m do not fit into 16-bit millimetres: the PNGs have {scale:g} levels per metre"
        ]  # fmt: skip
        self.scene_id = None if self.scene is None else find_name(self.scene, default_names(config), "scene")

    def prepare(self, image: np.ndarray, scene: int | None = None) -> Prepared:
        """Resize an image (H,W,3). scene: the number of its scene, in place of the predictor's."""
        size = fit_size(image.shape[0], image.shape[1], self._short, LONG_OVER_SHORT * self._short)
        return Prepared(image, (resize_area(image, size),), self.scene_id if scene is None else scene)

    def kind(self, prepared: Prepared) -> Any:
        """Return the size, and whether a scene is known."""
        return super().kind(prepared), prepared.given is None

    def forwards(self, prepared: Prepared) -> int:
        """Return the number of windows, and of their mirror images."""
        return len(self._grid(prepared)) * (1 + self.flip)

    def _grid(self, prepared: Prepared) -> WindowGrid:
        height, width = prepared.views[0].shape[:2]
        side = self._short if self.shift_window else max(height, width)
        return WindowGrid(shifted_axis(height, side), shifted_axis(width, side))

    def start(self, group: Sequence[Prepared]) -> Callable[[], list[DepthResult | ImageError]]:
        """Begin to predict on prepared images of one kind; see `BatchPredictor.start`."""
        model, grid, size = self.model, self._grid(group[0]), group[0].size
        flips, batch = (None, "horizontal") if self.flip else (None,), int(self.batch_size or 1)
        with evaluating(model):
            images = stacked((prepared.views[0] for prepared in group), model.device).to(model.dtype)
            views = images if not self.flip else torch.cat([images, images.flip(3)])
            batches = grid.batches(views, batch, fill=MID_GREY)
            if group[0].given is None:
                windows = [model(part, None)["pred_d"] for part in batches]
            else:
                scenes = torch.tensor([prepared.given for prepared in group], device=model.device)
                ids = scenes.repeat(len(flips)).repeat_interleave(len(grid)).split(batch)
                windows = [model(part, scenes)["pred_d"] for part, scenes in zip(batches, ids, strict=True)]
            found = torch.cat(windows).unflatten(0, (len(flips), len(group), len(grid)))
            pictures = []
            for i in range(len(group)):
                depths = [grid.field(found[v, i], size, flip).picture() for v, flip in enumerate(flips)]
                pictures.append(depths[0] if len(depths) == 1 else (depths[0] + depths[1]) / 2)
            transfer = Transfer(*pictures)

        def finish() -> list[DepthResult | ImageError]:
            return [self._result(*pair) for pair in zip(group, transfer.wait(), strict=True)]

        return finish

    def _result(self, prepared: Prepared, metres: np.ndarray) -> DepthResult | ImageError:
        if not np.isfinite(metres).all():
            return ImageError(NOT_FINITE)
        return DepthResult(prepared.image, metres[0], self.model.config.max_depth)
