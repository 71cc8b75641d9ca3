"""Draws the results of `roofline.py`: roofs and kinds of layers, and floors beside measured times by stage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from peaks import Device
from PIL import Image, ImageDraw, ImageFont

from vpd_fast.benchmark.chart import BAR, COLOURS, GAP
from vpd_fast.pictures.canvas import BACKGROUND, FAINT, FONT_SIZE, MARGIN, TEXT

Box = tuple[float, float, float, float]
Row = dict[str, Any]
GRID = (52, 56, 64)
STAGE_COLOURS = COLOURS | {"text": (210, 200, 90), "all": (140, 146, 158)}
STAGE_NAMES = {"all": "between layers"}
PLOT, BARS = (900, 440), 700  # pixels
LABELS = 70  # pixels left of a plot
LARGEST_DOT = 44  # pixels, radius, of what is all of the floor
SMALLEST_DOT = 4
NAMED = 13  # dots that get a name
SHOWN = 1e-3  # of the floor: what is less has no dot
ROOFED = 1e-2  # of the floor: a precision that has less of it has no roof


def draw(results: Sequence[dict[str, Any]], device: Device) -> Image.Image:
    """A picture of `roofline.analyse`'s results, one plot below the other, and the bars of all below them."""
    font, large = ImageFont.load_default(FONT_SIZE - 4), ImageFont.load_default(FONT_SIZE + 2)
    width = 2 * MARGIN + LABELS + PLOT[0] + MARGIN
    heading, axis = 44, 64
    bars = sum(1 + ("ms" in r["total"]) for r in results)
    height = MARGIN + len(results) * (heading + PLOT[1] + axis) + heading + bars * (BAR + GAP) + 5 * MARGIN + BAR
    picture = Image.new("RGB", (width, height), BACKGROUND)
    canvas = ImageDraw.Draw(picture)
    left, y = MARGIN + LABELS, MARGIN
    for result in results:
        canvas.text((MARGIN, y + heading // 2), _title(result), TEXT, large, anchor="lm")
        y += heading
        _Plot(canvas, (left, y, left + PLOT[0], y + PLOT[1]), result, device, font).draw()
        y += PLOT[1] + axis
    canvas.text((MARGIN, y + heading // 2), "ms per pass, by stage", TEXT, large, anchor="lm")
    y += heading
    _bars(canvas, y, results, font)
    y += bars * (BAR + GAP) + MARGIN
    _legend(canvas, MARGIN, y, results, font)
    canvas.text((MARGIN, height - MARGIN), f"{device.name}: {device.source}", FAINT, font, anchor="lm")
    return picture


def _title(result: dict[str, Any]) -> str:
    size, total = result["size"], result["total"]
    text = f"{result['task']}, {result['precision']}, {result['batch']}x3x{size}x{size}: "
    text += f"at least {_number(total['floor_ms'])} ms"
    return text + (f", measured {_number(total['ms'])} ms" if "ms" in total else "")


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _dots(parts: Sequence[Row], total: float) -> list[Row]:
    """Parts of a stage with the same kind, size and precision together, the largest first."""
    from roofline import grouped

    rows = [row for row in grouped(parts, "stage", "kind", "side", "in") if row["made_gflop"]]
    return [row for row in rows if row["floor_ms"] >= SHOWN * total and row["in"]]


class _Plot:
    """Rate over operations per byte, both logarithmic: the roofs of a device and a dot for each kind of layer."""

    def __init__(
        self, canvas: ImageDraw.ImageDraw, box: Box, result: dict[str, Any], device: Device, font: Any
    ) -> None:
        self.canvas, self.box, self.device, self.font = canvas, box, device, font
        self.total = result["total"]["floor_ms"]
        self.dots = _dots(result["parts"], self.total)
        floors = {name: sum(row["floor_ms"] for row in self.dots if row["in"] == name) for name in device.gflop_per_s}
        self.roofs = {name: device.gflop_per_s[name] for name, floor in floors.items() if floor >= ROOFED * self.total}
        intensities = [row["flop_per_byte"] for row in self.dots]
        ridges = [rate / device.gb_per_s for rate in self.roofs.values()]
        self.x_range = math.log10(min(*intensities, *ridges) / 2), math.log10(max(*intensities, *ridges) * 3)
        rates = [self._rate(row) for row in self.dots]
        self.y_range = math.log10(min(*rates, *self.roofs.values()) / 3), math.log10(max(self.roofs.values()) * 1.8)

    def draw(self) -> None:
        """Everything within the box, and the axes around it."""
        self._grid()
        self._roofs()
        for row in self.dots:
            (x, y), r = self._place(row), self._radius(row)
            self.canvas.ellipse((x - r, y - r, x + r, y + r), STAGE_COLOURS[row["stage"]], BACKGROUND)
        self._names()
        left, _, right, bottom = self.box
        measured = any("ms" in row for row in self.dots)
        note = "measured rate" if measured else "rate if every operation takes its floor"
        text = f"operations per byte; height: {note}; area: share of the floor"
        self.canvas.text(((left + right) // 2, bottom + 36), text, FAINT, self.font, anchor="mm")

    def _x(self, intensity: float) -> float:
        low, high = self.x_range
        return self.box[0] + (math.log10(intensity) - low) / (high - low) * (self.box[2] - self.box[0])

    def _y(self, rate: float) -> float:
        low, high = self.y_range
        return self.box[3] - (math.log10(rate) - low) / (high - low) * (self.box[3] - self.box[1])

    @staticmethod
    def _rate(row: Row) -> float:
        return row["made_gflop"] / row.get("ms", row["floor_ms"]) * 1e3

    def _place(self, row: Row) -> tuple[float, float]:
        return self._x(row["flop_per_byte"]), self._y(self._rate(row))

    def _radius(self, row: Row) -> float:
        return max(LARGEST_DOT * math.sqrt(row["floor_ms"] / self.total), SMALLEST_DOT)

    def _grid(self) -> None:
        left, top, right, bottom = self.box
        for tick in _ticks(*self.x_range):
            self.canvas.line((self._x(tick), top, self._x(tick), bottom), GRID)
            self.canvas.text((self._x(tick), bottom + 14), f"{tick:,.4g}", FAINT, self.font, anchor="mm")
        for tick in _ticks(*self.y_range):
            self.canvas.line((left, self._y(tick), right, self._y(tick)), GRID)
            text = f"{tick / 1e3:,.4g} T" if tick >= 1e3 else f"{tick:.4g} G"
            self.canvas.text((left - 8, self._y(tick)), text, FAINT, self.font, anchor="rm")
        self.canvas.text((left - LABELS + 2, top - 2), "FLOP/s", FAINT, self.font, anchor="lm")

    def _roofs(self) -> None:
        left, _, right, bottom = self.box
        bandwidth = self.device.gb_per_s
        for name, rate in self.roofs.items():
            y = self._y(rate)
            self.canvas.line((self._x(rate / bandwidth), y, right, y), TEXT, 2)
            text = f"{name} {_number(rate / 1e3)} T" if rate >= 1e3 else f"{name} {rate:.0f} G"
            self.canvas.text((right - 4, y - 12), text, TEXT, self.font, anchor="rm")
        ridge = max(self.roofs.values()) / bandwidth
        least = max(10.0 ** self.x_range[0], 10.0 ** self.y_range[0] / bandwidth)
        start, end = (self._x(least), self._y(least * bandwidth)), (self._x(ridge), self._y(ridge * bandwidth))
        self.canvas.line((*start, *end), TEXT, 2)
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        beside = x > left + 110  # on its left, if there is room
        place, anchor = ((x - 12, y - 12), "rm") if beside else ((x + 14, y + 14), "lm")
        self.canvas.text(place, f"{bandwidth:,.0f} GB/s", TEXT, self.font, anchor=anchor)

    def _names(self) -> None:
        """Of the largest dots, beside them, or below or above with a line, where nothing else is."""
        taken: list[Box] = []
        for row in self.dots:
            (x, y), r = self._place(row), self._radius(row)
            taken.append((x - r, y - r, x + r, y + r))
        for rate in self.roofs.values():
            y = self._y(rate)
            taken.append((self._x(rate / self.device.gb_per_s), y - 1, self.box[2], y + 1))
            taken.append((self.box[2] - 120, y - 22, self.box[2], y))
        for row in self.dots[:NAMED]:
            (x, y), r = self._place(row), self._radius(row)
            text, high = f"{row['kind']} at {row['side']}", FONT_SIZE
            wide = self.font.getlength(text)
            for dx, dy in _offsets(r, wide):
                spot = (x + dx, y + dy - high / 2, x + dx + wide, y + dy + high / 2)
                if _within(spot, self.box) and not any(_overlap(spot, other) for other in taken):
                    taken.append(spot)
                    if abs(dy) > r + high:
                        edge = spot[1] if dy > 0 else spot[3]
                        self.canvas.line((x, y + math.copysign(r, dy), x + dx + wide / 2, edge), FAINT)
                    self.canvas.text((spot[0], y + dy), text, STAGE_COLOURS[row["stage"]], self.font, anchor="lm")
                    break


def _offsets(r: float, wide: float) -> Iterator[tuple[float, float]]:
    """Where a name may be: of its left edge and its middle line, relative to the dot's middle."""
    yield from ((r + 4, 0), (-r - 4 - wide, 0))
    for step, side, shift in itertools.product(range(14), (1, -1), (0, 0.4, -0.4)):
        yield -wide / 2 + shift * wide, side * (r + 12 + 20 * step)


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, or only the powers, between two logarithms."""
    digits = (1, 2, 5) if high - low < 4 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = [digit * 10.0**power for power, digit in itertools.product(powers, digits)]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]


def _within(inner: Box, outer: Box) -> bool:
    return inner[0] > outer[0] and inner[1] > outer[1] and inner[2] < outer[2] and inner[3] < outer[3]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _bars(canvas: ImageDraw.ImageDraw, y: int, results: Sequence[dict[str, Any]], font: Any) -> None:
    names = max(font.getlength(f"{r['precision']} measured") for r in results)
    left = MARGIN + names + GAP
    longest = max(r["total"].get("ms", r["total"]["floor_ms"]) for r in results)
    for result in results:
        for key, word in (("floor_ms", "floor"), ("ms", "measured")):
            if key not in result["total"]:
                continue
            canvas.text((left - GAP, y + BAR // 2), f"{result['precision']} {word}", TEXT, font, anchor="rm")
            x = float(left)
            for stage in STAGE_COLOURS:
                row = next((row for row in result["totals"]["stage"] if row["stage"] == stage), {})
                size = max(row.get(key, 0.0), 0.0) / longest * BARS
                if size > 0:
                    canvas.rectangle((x, y, x + size, y + BAR), STAGE_COLOURS[stage])
                x += size
            text = _number(result["total"][key])
            if key == "ms":
                text += f"  {result['total']['ms'] / result['total']['floor_ms']:.2f}x the floor"
            canvas.text((x + GAP, y + BAR // 2), text, FAINT, font, anchor="lm")
            y += BAR + GAP


def _legend(canvas: ImageDraw.ImageDraw, x: float, y: int, results: Sequence[dict[str, Any]], font: Any) -> None:
    used = {row["stage"] for result in results for row in result["totals"]["stage"]}
    for stage, colour in STAGE_COLOURS.items():
        if stage in used:
            name = STAGE_NAMES.get(stage, stage)
            canvas.rounded_rectangle((x, y, x + 16, y + 16), 4, fill=colour)
            canvas.text((x + 24, y + 8), name, TEXT, font, anchor="lm")
            x += 24 + font.getlength(name) + 2 * GAP
