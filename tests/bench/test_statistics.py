"""From seconds to rows."""

from __future__ import annotations

import pytest

from vpd_fast.bench.statistics import percentile, rows_of, speedup


def test_percentile() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([1.0, 2.0], 20) == pytest.approx(1.2)
    assert percentile([5.0], 80) == 5.0


def test_a_speedup_is_a_median_of_ratios_within_rounds() -> None:
    # The machine is three times slower in the last round; a ratio of medians would be 2.0 / 1.0.
    assert speedup([1.0, 2.0, 6.0], [0.25, 1.0, 3.0]) == 2.0
    assert speedup([4.0, 1.0, 1.0], [1.0, 1.0, 1.0]) == 1.0


def test_rows() -> None:
    times = {"slow": [0.4, 0.4, 0.8], "fast": [0.1, 0.2, 0.1]}
    rows = rows_of(times, "slow", gigabytes=1.0, gflop=10.0, case="example")
    assert rows[0] | {"p20_ms": 400.0, "p80_ms": 640.0} == rows[0]
    assert rows[1] == {
        "case": "example",
        "variant": "fast",
        "rounds": 3,
        "p20_ms": 100.0,
        "p50_ms": 100.0,
        "p80_ms": 160.0,
        "speedup": 4.0,
        "over": "slow",
        "gb_per_s": 10.0,
        "gflop_per_s": 100.0,
    }


def test_rounds_must_match() -> None:
    with pytest.raises(ValueError, match="shorter"):
        rows_of({"a": [1.0, 1.0], "b": [1.0]}, "a")
