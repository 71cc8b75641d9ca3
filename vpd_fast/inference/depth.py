"""Depth in metres for images of any size: square windows along the long side, averaged with their mirror images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from vpd_fast.errors import ImageError
from vpd_fast.inference.finite import NOT_FINITE
from vpd_fast.inference.results import MILLIMETRES, DepthResult, depth_scale
from vpd_fast.inference.running import batch_size_for, evaluating
from vpd_fast.inference.windows import WindowAxis, WindowField, WindowGrid, check_pair
from vpd_fast.labels import default_names, find_name
from vpd_fast.pictures.reading import to_tensor
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
class DepthPredictor:
    """Predictor of depth: its options, checked, and the call that predicts on one image.

    scene: name or number of the scene; None: the mean of all scene embeddings.
    resize_to: the image is resized, ratio kept, to this short side (long side at most four times that); default
        base_size, but 480 where that is 512, as the released model was trained; NYUv2's 640x480 stay as they are.
    shift_window: predict on square windows along the long side and average where they overlap; False: on the image as a
        whole.
    flip: average with the mirrored image.
    batch_size: windows per forward; default 1 on a CPU, 8 on a GPU.

    notes: what whoever sees the results must know: the scale of the PNGs, if it is not millimetres.

    Shift window and flip are on by default, as in the published evaluation: four forwards for a 4:3 image.
    """

    model: DepthPerceiver
    scene: str | int | None = None
    resize_to: int | None = None
    shift_window: bool = True
    flip: bool = True
    batch_size: int | None = None

    def __post_init__(self) -> None:
        config = self.model.config
        self.batch_size = self._batch = batch_size_for(self.model, self.batch_size)
        default = RELEASED_SIZE if config.base_size == RELEASED_BASE else config.base_size
        self._short = check_pair("resize_to", default if self.resize_to is None else self.resize_to)[0]
        self.resize_to = self._short
        max_depth, scale = config.max_depth, depth_scale(config.max_depth)
        self.notes = [] if scale == MILLIMETRES else [
            f"depths up to {max_depth:g} m do not fit into 16-bit millimetres: the PNGs have {scale:g} levels per metre"
        ]  # fmt: skip
        self.scene_id = None if self.scene is None else find_name(self.scene, default_names(config), "scene")

    def __call__(self, image: np.ndarray) -> DepthResult:
        """Predict on an RGB image (H,W,3) as `read_image` returns it. Raises ImageError for NaN and infinity."""
        size = image.shape[0], image.shape[1]
        height, width = fit_size(*size, self._short, LONG_OVER_SHORT * self._short)
        side = self._short if self.shift_window else max(height, width)
        grid = WindowGrid(shifted_axis(height, side), shifted_axis(width, side))
        resized = to_tensor(resize_area(image, (height, width))).to(self.model.device, self.model.dtype)
        with evaluating(self.model):
            depth = self._field(resized, grid, size, None).picture()
            if self.flip:
                depth = (depth + self._field(resized.flip(3), grid, size, "horizontal").picture()) / 2
        metres = depth[0].cpu().numpy()
        if not np.isfinite(metres).all():
            raise ImageError(NOT_FINITE)
        return DepthResult(image, metres, self.model.config.max_depth)

    def _field(self, image: torch.Tensor, grid: WindowGrid, size: tuple[int, int], flip: str | None) -> WindowField:
        windows = []
        for batch in grid.batches(image, self._batch, fill=MID_GREY):
            class_ids = None
            if self.scene_id is not None:
                class_ids = torch.full((len(batch),), self.scene_id, dtype=torch.long, device=batch.device)
            windows.append(self.model(batch, class_ids)["pred_d"])
        return grid.field(torch.cat(windows), size, flip)
