"""What a benchmark found: rows for JSON, and tables to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from vpd_fast.bench.catalog import ENTRIES
from vpd_fast.bench.parity import GATES, failed, passes
from vpd_fast.bench.runner import Measurement, Seconds
from vpd_fast.bench.statistics import milliseconds, number, percentile, speedup
from vpd_fast.bench.variants import BACKBONE, STAGES, WHOLE

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]
MIB = 2**20


def row_of(measurement: Measurement, task: str, threads: int) -> Row:
    """One variant in one case, as plain values.

    Always: case, task, variant, threads. parity: "passed", "failed" or, without a baseline, "unchecked"; not given for
    the baseline. Speed-ups are given if it passed: "speedup" of the whole pass for variants that do all of it,
    "backbone_speedup" of encoder and UNet, "stage_speedups". Times are of a batch, "ms_per_image" is not.
    """
    row: Row = {"case": str(measurement.case), "task": task, "variant": measurement.variant, "threads": threads}
    if measurement.error:
        row["error"] = measurement.error
    is_baseline = measurement.variant == measurement.baseline
    row |= {} if is_baseline else _parity(measurement)
    row["peak_mib"] = {name: round(value / MIB, 1) for name, value in measurement.memory.items()}
    if measurement.seconds:
        stages = list(measurement.seconds[0])
        row |= milliseconds(_total(measurement.seconds, stages))
        row["ms_per_image"] = round(row["p50_ms"] / measurement.case.batch, 4)
        row["stages_ms"] = {stage: _median_ms(measurement.seconds, [stage]) for stage in stages}
        if WHOLE not in stages:
            row["backbone_ms"] = _median_ms(measurement.seconds, BACKBONE)
        if is_baseline or row["parity"] == "passed":
            row |= _speedups(measurement, stages)
    return row


def _parity(measurement: Measurement) -> Row:
    precision = ENTRIES[measurement.variant].precision
    if measurement.agreement is None or precision is None:
        return {"parity": "unchecked"}
    found = measurement.agreement
    cosines = {name: _rounded(found[name]) for name in ("latents", "features", "logits") if name in found}
    verdict = "passed" if passes(found, precision) else "failed"
    labels = {"equal_labels": round(found["labels"], 6)} if "labels" in found else {}
    return {"parity": verdict, "gate": GATES[precision], "cosines": cosines, **labels}


def _rounded(value: Any) -> Any:
    return [_rounded(v) for v in value] if isinstance(value, list) else round(value, 7)


def _speedups(measurement: Measurement, stages: Sequence[str]) -> Row:
    # Rounds in which the baseline was not there, because it failed, have nothing to be compared with.
    base = measurement.baseline_seconds
    own = measurement.seconds[: len(base)]
    if not base:
        return {}

    def over(chosen: Sequence[str]) -> float:
        return speedup(_total(base, chosen), _total(own, chosen))

    row: Row = {"over": measurement.baseline}
    if WHOLE in stages:
        return row | {"speedup": speedup(_total(base, list(base[0])), _total(own, stages))}
    if set(stages) == set(base[0]):
        row["speedup"] = over(stages)
    row["backbone_speedup"] = over(BACKBONE)
    row["stage_speedups"] = {stage: over([stage]) for stage in stages}
    return row


def _total(seconds: Sequence[Seconds], stages: Sequence[str]) -> list[float]:
    return [sum(values[stage] for stage in stages) for values in seconds]


def _median_ms(seconds: Sequence[Seconds], stages: Sequence[str]) -> float:
    return round(1e3 * percentile(_total(seconds, stages), 50), 4)


def _per_image(row: Row, value: float | None) -> str:
    """Milliseconds of a batch as those of an image."""
    return "" if value is None else number(value * row["ms_per_image"] / row["p50_ms"])


def _stage(stage: str, row: Row) -> str:
    return _per_image(row, row["stages_ms"].get(stage))


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _memory(row: Row) -> str:
    memory = row["peak_mib"]
    return f"{memory.get('run', 0):.0f}" + (f" ({memory['loaded']:.0f} from disk)" if "loaded" in memory else "")


COLUMNS: dict[str, Callable[[Row], str]] = {
    "variant": lambda row: row["variant"],
    "ms per image": lambda row: number(row["ms_per_image"]),
    "p20 - p80": lambda row: " - ".join(_per_image(row, row[name]) for name in ("p20_ms", "p80_ms")),
    "speed-up": lambda row: "FAILED" if failed(row) else _times(row.get("speedup")),
    **{"UNet" if stage == "unet" else stage: partial(_stage, stage) for stage in STAGES},
    "encoder + UNet": lambda row: (
        f"{_per_image(row, row.get('backbone_ms'))} {_times(row.get('backbone_speedup')):>7}".strip()
    ),
    "features": lambda row: f"{min(row['cosines']['features']):.5f}" if "cosines" in row else "",
    "logits": lambda row: f"{row['cosines']['logits']:.5f}" if "logits" in row.get("cosines", {}) else "",
    "labels": lambda row: f"{100 * row['equal_labels']:.2f} %" if "equal_labels" in row else "",
    "peak MiB": _memory,
}


def table(rows: Sequence[Row]) -> Table:
    """The rows of one case: milliseconds, speed-ups over the plain model, least cosines, equal labels, memory."""
    from rich.table import Table

    first = rows[0]
    timed = f", {first['timed']}" if "timed" in first else ""
    shown = Table(title=f"{first['task']}, {first['case']}, {first['threads']} threads{timed}", title_justify="left")
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
    for row in rows:
        missing = [row["variant"], "FAILED" if "error" in row else "not measured"]
        cells = [cell(row) for cell in COLUMNS.values()] if "p50_ms" in row else missing
        shown.add_row(*cells, style="red" if failed(row) else None)
    return shown


def line(row: Row) -> str:
    """The row in a line of text, for a log."""
    name = ", ".join([row["variant"], row["case"], *([row["timed"]] if "timed" in row else [])])
    if "error" in row:
        return f"{name}: FAILED: {row['error']}"
    shown = [f"{number(row['ms_per_image'])} ms per image"] if "ms_per_image" in row else ["not measured"]
    for column, text in (("speedup", "{} faster"), ("backbone_speedup", "encoder and UNet {} faster")):
        if column in row and row["variant"] != row["over"]:
            shown.append(text.format(_times(row[column])))
            break
    return f"{name}: {', '.join([*shown, *([row['parity']] if row.get('parity') == 'failed' else [])])}"


def remarks(rows: Sequence[Row], left_out: Sequence[str]) -> list[str]:
    """What a reader of the tables must know, one line each."""
    found = []
    for row in rows:
        where = f"{row['variant']}, {row['case']}"
        if "error" in row:
            found.append(f"FAILED: {where}: {row['error']}")
        elif row.get("parity") == "failed":
            found.append(f"FAILED: {where}: a cosine is below {row['gate']}: {row['cosines']}")
    return found + [f"left out: {line}" for line in left_out]
