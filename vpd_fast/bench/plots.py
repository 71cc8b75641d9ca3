"""Pictures of measurements, drawn by matplotlib: bars cut into stages, and layers below the roofs of a device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpd_fast.bench.parity import failed
from vpd_fast.bench.statistics import number
from vpd_fast.bench.variants import STAGES
from vpd_fast.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vpd_fast.bench.peaks import Device

Row = dict[str, Any]
COLOURS = {"encoder": "#568ee2", "unet": "#f09646", "head": "#78be6e", "post": "#c86ebe", "text": "#d2c85a"}
REST = "#8c929e"  # of a pass that is not cut into stages, and of what lies between layers
ORDER = ("text", *STAGES, "all")
FAILED = "#e25858"
LARGEST_DOT = 4000  # points^2, of a group of layers that is all of the floor
SHOWN = 1e-3  # of the floor; groups with less have no dot
ROOFED = 1e-2  # of the floor; precisions with less have no roof
NAMED = 10  # dots with a name


def new_figure(width: float, height: float, rows: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """An empty figure, without pyplot's global state and window. Raises MissingDependencyError."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("pictures need matplotlib: pip install 'vpd_fast[bench]'") from error
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
    return figure, list(axes)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, the same bytes for the same figure."""
    figure.savefig(path, format="png", metadata={"Software": None})


def stage_bars(rows: Sequence[Row], footer: str) -> Figure:
    """Milliseconds per image by stage and speed-ups of the rows of `report.row_of`, one plot per case.

    footer: written below, such as the name of the processor. Raises MissingDependencyError without matplotlib.
    """
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    heights = [len(group) + 1.2 for group in cases.values()]
    figure, axes = new_figure(9.5, 0.34 * sum(heights) + 0.9, heights)
    for axis, (case, group) in zip(axes, cases.items(), strict=True):
        longest = max((row.get("ms_per_image", 0) for row in group), default=0) or 1
        for y, row in enumerate(group):
            end = _bar(axis, y, _stages_per_image(row)) + longest / 100
            axis.text(end, y, _note(row), va="center", fontsize=9, color=FAILED if failed(row) else "black")
        axis.set_xlim(0, 1.3 * longest)
        _label_bars(axis, [row["variant"] for row in group], f"{group[0]['task']}, {case}: ms per image")
    _legend(figure, STAGES, footer)
    return figure


def _bar(axis: Axes, y: int, stages: dict[str, float]) -> float:
    """Draw a bar cut into stages; where it ends."""
    left = 0.0
    for stage, size in stages.items():
        axis.barh(y, size, 0.72, left, color=COLOURS.get(stage, REST))
        left += size
    return left


def _label_bars(axis: Axes, names: Sequence[str], title: str) -> None:
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_title(title, loc="left", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)


def _stages_per_image(row: Row) -> dict[str, float]:
    """Milliseconds of an image by stage, scaled so that they add up: medians of stages do not."""
    if "ms_per_image" not in row:
        return {}
    stages = row["stages_ms"]
    whole = sum(stages.values()) or 1
    return {stage: value / whole * row["ms_per_image"] for stage, value in stages.items()}


def _note(row: Row) -> str:
    time = number(row["ms_per_image"]) if "ms_per_image" in row else ""
    if failed(row):
        return f"{time} FAILED".strip()
    if "speedup" in row:
        return f"{time}  {row['speedup']:.2f}x"
    if "backbone_speedup" in row:
        return f"{time}  {row['backbone_speedup']:.2f}x (encoder + UNet)"
    return time


def _legend(figure: Figure, stages: Sequence[str], footer: str) -> None:
    from matplotlib.patches import Patch

    names = {"all": "between layers"}
    handles = [Patch(color=COLOURS.get(stage, REST), label=names.get(stage, stage)) for stage in stages]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=len(stages), fontsize=9, frameon=False)
    legend.set_title(footer)
    legend.get_title().set_fontsize(8)


def roofline(results: Sequence[dict[str, Any]], groups: Sequence[Sequence[Row]], device: Device) -> Figure:
    """One plot of rate over operations per byte for each result, and bars of floors and measured times by stage.

    results: of `benchmarks/roofline.py`. groups: for each result its layers in groups, the largest floor first, as rows
    with stage, kind, side, in, made_gflop, flop_per_byte, floor_ms and maybe ms. Raises MissingDependencyError.
    """
    bars = sum(1 + ("ms" in result["total"]) for result in results)
    heights = [*[10.0] * len(results), bars + 1.5]
    figure, axes = new_figure(10.5, 0.5 * sum(heights) + 0.6, heights)
    for axis, result, rows in zip(axes, results, groups, strict=False):
        _roofs(axis, result, rows, device)
    _floor_bars(axes[-1], results)
    present = {row["stage"] for result in results for row in result["totals"]["stage"]}
    _legend(figure, [stage for stage in ORDER if stage in present], f"{device.name}: {device.source}")
    return figure


def _roofs(axis: Axes, result: dict[str, Any], rows: Sequence[Row], device: Device) -> None:
    total = result["total"]["floor_ms"]
    dots = [row for row in rows if row["made_gflop"] and row["in"] and row["floor_ms"] >= SHOWN * total]
    floors = {name: sum(row["floor_ms"] for row in dots if row["in"] == name) for name in device.gflop_per_s}
    roofs = {name: device.gflop_per_s[name] for name, floor in floors.items() if floor >= ROOFED * total}
    x = [row["flop_per_byte"] for row in dots]
    y = [1e-3 * row["made_gflop"] / row.get("ms", row["floor_ms"]) * 1e3 for row in dots]  # TFLOP/s
    ridges = [rate / device.gb_per_s for rate in roofs.values()]
    low, high = min(*x, *ridges) / 2, max(*x, *ridges) * 3
    top = max(roofs.values()) / 1e3
    axis.plot([low, max(ridges)], [low * device.gb_per_s / 1e3, top], color="black", lw=1.2)
    for name, rate in roofs.items():
        axis.plot([rate / device.gb_per_s, high], [rate / 1e3] * 2, color="black", lw=1.2)
        axis.text(high, rate / 1e3, f"{name} {rate / 1e3:.3g} T ", ha="right", va="bottom", fontsize=8)
    sizes = [max(LARGEST_DOT * row["floor_ms"] / total, 12) for row in dots]
    colours = [COLOURS.get(row["stage"], REST) for row in dots]
    axis.scatter(x, y, sizes, colours, edgecolors="white", linewidths=0.5, zorder=3, alpha=0.9)
    names = []
    for i, (row, x_of, y_of) in enumerate(list(zip(dots, x, y, strict=True))[:NAMED], 1):
        axis.text(x_of, y_of, str(i), ha="center", va="center", fontsize=7, zorder=4)
        names.append(f"{i}  {row['stage']}, {row['kind']} at {row['side']}")
    axis.text(0.99, 0.02, "\n".join(names), transform=axis.transAxes, ha="right", va="bottom", fontsize=8)
    axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(min(*y, top) / 5, 1.8 * top))
    axis.yaxis.set_minor_formatter("")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_major_formatter("{x:g}")
    measured = any("ms" in row for row in dots)
    axis.set_ylabel("TFLOP/s, measured" if measured else "TFLOP/s at the floor")
    axis.set_xlabel("operations per byte; area: share of the floor", fontsize=9)
    axis.set_title(_title(result), loc="left", fontsize=11)
    axis.grid(alpha=0.3)


def _title(result: dict[str, Any]) -> str:
    total, size = result["total"], result["size"]
    text = f"{result['task']}, {result['precision']}, {result['batch']}x3x{size}x{size}: "
    text += f"at least {number(total['floor_ms'])} ms"
    return text + (f", measured {number(total['ms'])} ms" if "ms" in total else "")


def _floor_bars(axis: Axes, results: Sequence[dict[str, Any]]) -> None:
    names: list[str] = []
    for result in results:
        total = result["total"]
        for key, word in (("floor_ms", "floor"), ("ms", "measured")):
            if key not in total:
                continue
            rows = sorted(result["totals"]["stage"], key=lambda row: ORDER.index(row["stage"]))
            end = _bar(axis, len(names), {row["stage"]: max(row.get(key, 0.0), 0.0) for row in rows})
            gap = f"  {total['ms'] / total['floor_ms']:.2f}x the floor" if key == "ms" else ""
            axis.text(end, len(names), f" {number(total[key])}{gap}", va="center", fontsize=9)
            names.append(f"{result['precision']} {word}")
    axis.margins(x=0.25)
    axis.set_xlim(left=0)
    _label_bars(axis, names, "ms per pass, by stage")
