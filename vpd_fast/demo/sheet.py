"""The demo's picture: a row per scene with what each task makes of it, and where the network attends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from vpd_fast.data.shapes import CLASSES
from vpd_fast.evaluation import panels
from vpd_fast.inference import SegmentationResult
from vpd_fast.pictures import canvas

if TYPE_CHECKING:
    from vpd_fast.data import Sample
    from vpd_fast.demo.run import Demo
    from vpd_fast.inference import Result

TILE, GAP, MARGIN = 300, 10, 24
MAPS = 2  # per scene: of its largest objects' classes
_BACKGROUND_CLASSES = ("floor", "wall")


def contact_sheet(demo: Demo) -> Image.Image:
    """Draw the scenes in `demo.shown` as one RGB picture."""
    rows = [_tiles(results) for results in demo.shown]
    columns = len(rows[0])
    bar = canvas.FONT_SIZE + 14
    width = 2 * MARGIN + columns * (TILE + GAP) - GAP
    height = 2 * MARGIN + 40 + len(rows) * (TILE + bar + GAP) - GAP
    sheet = Image.new("RGB", (width, height), canvas.BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    title = f"vpd_fast on drawn scenes, fast models in {demo.precision}"
    draw.text((MARGIN, MARGIN + 10), title, canvas.TEXT, canvas.load_font(24), anchor="lm")
    for i, row in enumerate(rows):
        for j, (name, tile) in enumerate(row):
            left, top = MARGIN + j * (TILE + GAP), MARGIN + 40 + i * (TILE + bar + GAP)
            font = _fitting_font(name, TILE)
            draw.text((left, top + bar // 2), name, canvas.FAINT, font, anchor="lm")
            sheet.paste(tile.resize((TILE, TILE), Image.Resampling.LANCZOS), (left, top + bar))
    return sheet


def _fitting_font(text: str, width: int) -> canvas.Font:
    """Return the usual font, or a smaller one where the text would not fit; never too small to read."""
    sizes = (size for size in range(canvas.FONT_SIZE, 11, -1) if canvas.load_font(size).getlength(text) <= width)
    return canvas.load_font(next(sizes, 11))


def _tiles(results: dict[str, tuple[Sample, Result]]) -> list[tuple[str, Image.Image]]:
    sample, labelled = results["segmentation"]
    depth_sample, depth = results["depth"]
    spoken, masked = results["referring"]
    assert isinstance(labelled, SegmentationResult)
    assert labelled.maps is not None
    image, maps = sample.image, labelled.maps
    segmentation = panels.segmentation(image, labelled.labels, sample.target, CLASSES).panels
    valid = np.ones_like(depth_sample.target, bool)
    metres = panels.depth(image, depth.values, depth_sample.target, valid).panels
    # Scenes that no sentence fits are replaced by others, for this task alone.
    referring = panels.referring(spoken.image, masked.values[0], spoken.target.astype(bool), spoken.sentences[0]).panels
    chosen = [name for name in labelled.shares() if name not in _BACKGROUND_CLASSES][:MAPS]
    chosen += [name for name in _BACKGROUND_CLASSES if len(chosen) < MAPS][: MAPS - len(chosen)]
    photo = canvas.display_photo(image, longest=panels.LONGEST)
    return [
        ("scene", segmentation[0][1]),
        ("labels", segmentation[1][1]),
        (f"depth, {metres[1][0].removeprefix('prediction, ')}", metres[1][1]),
        (f"\u201c{spoken.sentences[0]}\u201d", referring[1][1]),
        *((f"attention to {name}", canvas.heatmap(photo, maps[name])) for name in chosen),
    ]
