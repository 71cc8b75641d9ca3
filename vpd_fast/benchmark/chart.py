"""The result of a benchmark as a picture: one bar per variant, cut into stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vpd_fast.benchmark.variants import STAGES
from vpd_fast.pictures.canvas import BACKGROUND, FAINT, FONT_SIZE, MARGIN, TEXT

COLOURS = {"encoder": (86, 142, 226), "unet": (240, 150, 70), "head": (120, 190, 110), "post": (200, 110, 190)}
FAILED = (226, 88, 88)
BAR, GAP, BARS_WIDTH = 26, 12, 640


def draw(rows: Sequence[dict[str, Any]], footer: str) -> Image.Image:
    """A chart of the rows of `report.row_of`: milliseconds per image by stage, and speed-ups; cases below each other.

    footer: written below, such as the name of the processor.
    """
    font, large = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(FONT_SIZE + 4)
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    names = round(max((font.getlength(row["variant"]) for row in rows), default=0))
    notes = round(max((font.getlength(_note(row)) for row in rows), default=0))
    left = MARGIN + names + GAP
    width = left + BARS_WIDTH + GAP + max(notes, 120) + MARGIN
    heading = 2 * (FONT_SIZE + 4)
    height = MARGIN + sum(heading + len(group) * (BAR + GAP) + MARGIN for group in cases.values()) + 3 * MARGIN + BAR
    picture = Image.new("RGB", (width, height), BACKGROUND)
    canvas = ImageDraw.Draw(picture)
    y = MARGIN
    for case, group in cases.items():
        canvas.text((MARGIN, y + heading // 3), f"{group[0]['task']}, {case}: ms per image", TEXT, large, anchor="lm")
        y += heading
        longest = max((row.get("ms_per_image", 0) for row in group), default=0) or 1
        for row in group:
            _bar(canvas, row, left, y, BARS_WIDTH / longest, font)
            y += BAR + GAP
        y += MARGIN
    _legend(canvas, left, y, font)
    canvas.text((MARGIN, height - MARGIN), footer, FAINT, font, anchor="lm")
    return picture


def _bar(
    canvas: ImageDraw.ImageDraw, row: dict[str, Any], left: int, y: int, scale: float, font: ImageFont.FreeTypeFont
) -> None:
    middle = y + BAR // 2
    canvas.text((left - GAP, middle), row["variant"], TEXT, font, anchor="rm")
    x = float(left)
    if "ms_per_image" in row:
        images = row["p50_ms"] / row["ms_per_image"]
        whole = sum(row["stages_ms"].values()) / images or 1
        for stage in STAGES:  # medians of stages do not add up to the median of the whole
            size = row["stages_ms"].get(stage, 0) / images * row["ms_per_image"] / whole * scale
            if size > 0:
                canvas.rectangle((x, y, x + size, y + BAR), COLOURS[stage])
            x += size
    failed = "error" in row or row.get("parity") == "failed"
    canvas.text((x + GAP, middle), _note(row), FAILED if failed else FAINT, font, anchor="lm")


def _note(row: dict[str, Any]) -> str:
    time = f"{row['ms_per_image']:,.0f}" if "ms_per_image" in row else ""
    if "error" in row or row.get("parity") == "failed":
        return f"{time} FAILED".strip()
    if "speedup" in row:
        return f"{time}  {row['speedup']:.2f}x"
    if "backbone_speedup" in row:
        return f"{time}  {row['backbone_speedup']:.2f}x (encoder + UNet)"
    return time


def _legend(canvas: ImageDraw.ImageDraw, x: float, y: int, font: ImageFont.FreeTypeFont) -> None:
    for stage in STAGES:
        canvas.rounded_rectangle((x, y, x + 16, y + 16), 4, fill=COLOURS[stage])
        canvas.text((x + 24, y + 8), stage, TEXT, font, anchor="lm")
        x += 24 + font.getlength(stage) + 2 * GAP
