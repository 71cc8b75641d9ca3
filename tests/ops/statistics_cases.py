"""What is expected of the statistics that operators find of their results."""

from __future__ import annotations

import torch
from torch import Tensor

from vpd_fast.ops.statistics import Statistics, run_length, statistics_shape

UNIT = 2.0**-24


def empty_statistics(batch: int, positions: int, channels: int) -> Statistics:
    return Statistics(torch.full(statistics_shape(batch, positions, channels), torch.nan), run_length(positions))


def assert_statistics(statistics: Statistics, out: Tensor) -> None:
    """Those of `out` (B, ..., C) as it is stored: least and largest exactly, the others to float32 rounding.

    Mean and what it is off make up the mean to a rounding of the differences, and the sum of squares is about the mean
    that was found, so that neither depends on how far from zero the numbers are.
    """
    rows = out.flatten(1, -2).double()
    for i, part in enumerate(rows.split(statistics.run, dim=1)):
        mean, rest, squares, low, high = statistics.data[:, i].double().unbind(1)
        assert torch.equal(low, part.amin(1))
        assert torch.equal(high, part.amax(1))
        spread = (part - part.mean(1, keepdim=True)).abs().amax(1) + UNIT * part.abs().amax(1)
        assert ((mean + rest - part.mean(1)).abs() <= statistics.run * UNIT * spread).all()
        exact = (part - part.mean(1, keepdim=True)).square().sum(1)
        assert (
            (squares - exact).abs() <= 2 * statistics.run * UNIT * exact + (statistics.run * UNIT * spread) ** 2
        ).all()
