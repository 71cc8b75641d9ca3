"""The worst cases of an evaluation as one page (HTML without other files) and as one picture."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from vpd_fast.pictures.canvas import BACKGROUND, FAINT, TEXT, load_font

if TYPE_CHECKING:
    from vpd_fast.evaluation.tasks import Finding

MARGIN, GAP = 24, 8
JPEG_QUALITY = 88
SHEET_ROWS = 100  # a picture of more rows than this can hardly be opened


@dataclass(frozen=True)
class Case:
    """A bad case: where it comes from, its score as text, its panels as (title, JPEG), legend and caption."""

    key: tuple[float, int, int]
    name: str
    score: str
    panels: tuple[tuple[str, bytes], ...]
    legend: tuple[tuple[tuple[int, int, int], str, str], ...]
    caption: str


class Worst:
    """The `count` worst cases seen so far; only they are drawn, and only their thumbnails are kept.

    A key is (-badness, index, number within the sample): cases are sorted by it, so ties do not depend on the order.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.cases: list[Case] = []

    def offer(self, index: int, number: int, name: str, score: str, finding: Finding) -> None:
        """Keep the finding if it is among the worst."""
        key = (-finding.badness, index, number)
        if not self.count or (len(self.cases) == self.count and key > self.cases[-1].key):
            return
        drawing = finding.draw()
        panels = tuple((title, _jpeg(picture)) for title, picture in drawing.panels)
        self.cases.append(Case(key, name, score, panels, tuple(drawing.legend), drawing.caption))
        self.cases.sort(key=lambda case: case.key)
        del self.cases[self.count :]


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def sheet(cases: Sequence[Case], title: str, subtitle: str) -> Image.Image:
    """Draw one picture with a row per case, the first SHEET_ROWS of them."""
    rows = [_row(case, rank) for rank, case in enumerate(cases[:SHEET_ROWS], 1)]
    width = max([row.width for row in rows], default=640) + 2 * MARGIN
    height = 2 * MARGIN + 64 + sum(row.height + MARGIN for row in rows)
    picture = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN + 12), title, TEXT, load_font(26), anchor="lm")
    draw.text((MARGIN, MARGIN + 44), subtitle, FAINT, load_font(17), anchor="lm")
    top = MARGIN + 64 + MARGIN // 2
    for row in rows:
        picture.paste(row, (MARGIN, top))
        top += row.height + MARGIN
    return picture


def _row(case: Case, rank: int) -> Image.Image:
    tiles = [(title, Image.open(io.BytesIO(jpeg))) for title, jpeg in case.panels]
    width = sum(tile.width for _, tile in tiles) + GAP * (len(tiles) - 1)
    lines = 2 + bool(case.caption)
    legend = _legend_lines(case, width)
    head = 30 * (lines - 1) + 26
    height = head + max(tile.height for _, tile in tiles) + 30 * len(legend) + 4
    row = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(row)
    draw.text((0, 14), f"{rank}.  {case.score}", TEXT, load_font(20), anchor="lm")
    start = load_font(20).getlength(f"{rank}.  {case.score}") + 16
    draw.text((start, 14), _shortened(case.name, width - start, 17), FAINT, load_font(17), anchor="lm")
    if case.caption:
        draw.text((0, 44), _shortened(f"\u201c{case.caption}\u201d", width, 19), TEXT, load_font(19), anchor="lm")
    left = 0
    for title, tile in tiles:
        draw.text((left, head - 13), _shortened(title, tile.width, 15), FAINT, load_font(15), anchor="lm")
        row.paste(tile, (left, head))
        left += tile.width + GAP
    for i, line in enumerate(legend):
        middle = height - 30 * (len(legend) - i) + 17
        for left, colour, name, value in line:
            draw.rounded_rectangle((left, middle - 7, left + 14, middle + 7), 3, fill=colour, outline=FAINT)
            draw.text((left + 22, middle), name, TEXT, load_font(15), anchor="lm")
            draw.text((left + 30 + load_font(15).getlength(name), middle), value, FAINT, load_font(15), anchor="lm")
    return row


def _legend_lines(case: Case, width: int) -> list[list[tuple[int, tuple[int, int, int], str, str]]]:
    """Return (left, colour, name, value) of the legend, wrapped to `width`."""
    lines: list[list[tuple[int, tuple[int, int, int], str, str]]] = []
    left = width
    for colour, name, value in case.legend:
        needed = int(30 + load_font(15).getlength(name) + load_font(15).getlength(value) + 28)
        if left + needed > width:
            lines.append([])
            left = 0
        lines[-1].append((left, colour, name, value))
        left += needed
    return lines


def _shortened(text: str, width: float, size: int) -> str:
    font = load_font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "\u2026") > width:
        text = text[:-1]
    return text + "\u2026"


_STYLE = """
:root { color-scheme: dark; }
body { margin: 0; background: #181a1f; color: #eceef2; font: 16px/1.45 system-ui, sans-serif; }
main { max-width: 2040px; margin: 0 auto; padding: 32px 24px; }
h1 { font-size: 26px; margin: 0 0 4px; }
p { margin: 0; color: #969ca8; }
ol { list-style: none; margin: 24px 0 0; padding: 0; display: grid; gap: 24px; }
li.case { background: #20232a; border-radius: 10px; padding: 16px 18px 18px; }
h2 { font-size: 18px; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 span { font-weight: 400; color: #969ca8; margin-left: 10px; }
blockquote { margin: 2px 0 0; font-size: 17px; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 10px; margin-top: 10px; }
figure { margin: 0; }
figcaption { font-size: 14px; color: #969ca8; margin-bottom: 4px; }
img { width: 100%; display: block; border-radius: 6px; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 22px; margin-top: 12px; font-size: 14px; }
.legend i { display: inline-block; width: 14px; height: 14px; border-radius: 3px; margin-right: 7px;
  vertical-align: -2px; }
.legend b { font-weight: 400; color: #969ca8; margin-left: 6px; }
"""


def page(cases: Sequence[Case], title: str, subtitle: str) -> str:
    """Write the cases as HTML that needs no other file and runs no script."""
    items = "\n".join(_item(case, rank) for rank, case in enumerate(cases, 1))
    name = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{name}</h1>\n<p>{html.escape(subtitle)}</p>\n<ol>\n{items}\n</ol>\n</main>\n</body>\n</html>\n"
    )


def _item(case: Case, rank: int) -> str:
    figures = "".join(
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<img src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" '
        f'alt="{html.escape(f"{title} of {case.name}")}"></figure>\n'
        for title, jpeg in case.panels
    )
    legend = "".join(
        f'<span><i style="background: rgb{tuple(colour)}"></i>{html.escape(name)}<b>{html.escape(value)}</b></span>\n'
        for colour, name, value in case.legend
    )
    quote = f"<blockquote>\u201c{html.escape(case.caption)}\u201d</blockquote>\n" if case.caption else ""
    return (
        f'<li class="case">\n<h2>{rank}. {html.escape(case.score)}<span>{html.escape(case.name)}</span></h2>\n'
        f'{quote}<div class="panels">\n{figures}</div>\n<div class="legend">\n{legend}</div>\n</li>'
    )
