"""Numbers that say how fast something is.

Machines change speed while one measures. So variants take turns, round by round, and a speed-up is the median over the
rounds of a ratio taken within a round.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the values lie, interpolated."""
    return float(numpy.percentile(values, percent))


def speedup(baseline: Sequence[float], values: Sequence[float]) -> float:
    """Median over the rounds of baseline / value, both measured in the same round."""
    return round(statistics.median(base / value for base, value in zip(baseline, values, strict=True)), 2)


def milliseconds(values: Sequence[float]) -> dict[str, Any]:
    """Rounds, and p20, p50 and p80 of seconds in milliseconds."""
    return {"rounds": len(values)} | {f"p{p}_ms": round(1e3 * percentile(values, p), 4) for p in (20, 50, 80)}


def number(value: float) -> str:
    """Three digits or so, for tables and pictures."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def rows_of(
    times: Mapping[str, Sequence[float]],
    baseline: str,
    gigabytes: float | None = None,
    gflop: float | None = None,
    **facts: Any,
) -> list[dict[str, Any]]:
    """One row per variant: milliseconds (p20, p50, p80), speed-up over the baseline, rates if the amounts are given.

    times: seconds of each variant, one number per round.
    """
    rows = []
    for name, values in times.items():
        row = {**facts, "variant": name, **milliseconds(values)}
        row |= {"speedup": speedup(times[baseline], values), "over": baseline}
        if gigabytes is not None:
            row["gb_per_s"] = round(gigabytes / percentile(values, 50), 2)
        if gflop is not None:
            row["gflop_per_s"] = round(gflop / percentile(values, 50), 1)
        rows.append(row)
    return rows
