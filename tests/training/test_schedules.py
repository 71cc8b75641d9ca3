"""Schedules against the original's formulas at tabulated steps."""

from __future__ import annotations

import pytest

from vpd_fast.errors import InputError
from vpd_fast.training.schedules import make_schedule


def test_segmentation():
    factor = make_schedule("poly_warmup", steps=80000)
    table = {
        0: 1e-6,
        750: (1 - 750 / 80000) * (1 - 0.5 * (1 - 1e-6)),  # 0.4953130...
        1499: (1 - 1499 / 80000) * (1 - (1 - 1e-6) / 1500),
        1500: 0.98125,
        40000: 0.5,
        79999: 1.25e-5,
    }
    for step, expected in table.items():
        assert factor(step) == pytest.approx(expected, rel=1e-9)
    assert factor(750) == pytest.approx(0.4953129953, rel=1e-9)


def test_referring():
    factor = make_schedule("poly", steps=1000, power=0.9)
    assert [factor(step) for step in (0, 500, 900, 999)] == pytest.approx(
        [1.0, 0.5358867313, 0.1258925412, 0.00199526231497], rel=1e-9
    )


def test_depth():
    """25 epochs of 4 steps: 48 up and 52 down, the first step counts as 1."""
    factor = make_schedule("up_down", steps=100, min_lr=3e-5, max_lr=5e-4)

    def original(count: int, epochs: int = 25, iterations: int = 4) -> float:
        half = epochs // 2
        if count < iterations * half:
            return (5e-4 - 3e-5) * (count / iterations / half) ** 0.9 + 3e-5
        return max(3e-5, (3e-5 - 5e-4) * (count / iterations / half - 1) ** 0.9 + 5e-4)

    for step in range(100):
        assert 5e-4 * factor(step) == pytest.approx(original(step + 1), rel=1e-12)
    assert factor(47) == 1.0
    assert factor(0) == pytest.approx(0.06 + 0.94 * (1 / 48) ** 0.9)
    assert factor(99) == pytest.approx(0.06)


def test_constant_and_bad_input():
    assert make_schedule("constant", steps=3)(2) == 1.0
    with pytest.raises(InputError, match="constant, poly, poly_warmup, up_down, got 'cosine'"):
        make_schedule("cosine", steps=3)
    with pytest.raises(InputError, match="at least one step"):
        make_schedule("poly", steps=0)
    with pytest.raises(TypeError, match="speed"):
        make_schedule("poly", steps=3, speed=1)
