"""Numbers that say how fast something is.

Machines change speed while one measures. So variants take turns, round by round, and a speed-up is the median over the
rounds of a ratio taken within a round.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the values lie, interpolated."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def speedup(baseline: Sequence[float], values: Sequence[float]) -> float:
    """Median over the rounds of baseline / value, both measured in the same round."""
    return round(statistics.median(base / value for base, value in zip(baseline, values, strict=True)), 2)


def milliseconds(values: Sequence[float]) -> dict[str, Any]:
    """Rounds, and p20, p50 and p80 of seconds in milliseconds."""
    return {"rounds": len(values)} | {f"p{p}_ms": round(1e3 * percentile(values, p), 4) for p in (20, 50, 80)}


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
