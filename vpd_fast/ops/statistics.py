"""Statistics of activations that the operator that makes them may find on the way, for `group_norm_affine`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vpd_fast.errors import InputError
from vpd_fast.ops._checks import check, check_tensor, check_value, is_int

MAX_RUN = 1 << 30
PLANES = 5  # mean, its rounding error, M2 (sum of squared deviations), minimum, maximum


@dataclass(frozen=True)
class Statistics:
    """Statistics of each channel of an activation (B, ..., C), in runs of positions.

    data: (B, runs, 5, C) float32, contiguous but for its first stride. run: positions of a run; the last may have
    fewer. Raises InputError unless they are.
    """

    data: Tensor
    run: int

    def __post_init__(self) -> None:
        good = is_int(self.run) and 0 < self.run <= MAX_RUN
        check_value(good, f"statistics.run must be a positive integer of at most {MAX_RUN}", self.run)
        check_tensor("statistics.data", self.data, "B runs 5 C", (torch.float32,), "B", **{"5": PLANES})
        channels = self.data.shape[3]
        if self.data.stride()[1:] != (PLANES * channels, channels, 1):
            got = self.data.stride()
            raise InputError(f"statistics.data must be contiguous but for its first stride, got strides {got}")

    def __iter__(self) -> Iterator[Any]:
        """Data and run, so that `data, run = statistics` takes them apart."""
        return iter((self.data, self.run))


def run_length(positions: int) -> int:
    """Positions of a run for an image of so many, such that tiles of a product have whole runs if that is possible.

    Small images have short runs, because blocks that share a sum finish as few as 16 rows of a tile each; of large ones
    there would be too many.
    """
    long = (run for run in (128, 64, 32) if positions % run == 0 and positions >= run * run)
    return next(long, 16 if positions % 16 == 0 else 64)


def statistics_shape(batch: int, positions: int, channels: int) -> tuple[int, int, int, int]:
    """Shape of `Statistics.data` with runs of `run_length(positions)`."""
    return batch, -(-positions // run_length(positions)), PLANES, channels


def check_statistics(
    name: str, statistics: Any, batch: int, positions: int, channels: int, device: torch.device
) -> tuple[Tensor | None, int]:
    """Returns (data, run), or (None, 1) for None. Raises InputError unless they are statistics of such activations."""
    if statistics is None:
        return None, 1
    check(isinstance(statistics, Statistics), f"{name} must be Statistics, got {type(statistics).__name__}")
    data, run = statistics.data, statistics.run
    sizes = {"B": batch, "runs": -(-positions // run), "5": PLANES, "C": channels}
    check_tensor(f"{name}.data", data, "B runs 5 C", (torch.float32,), "B", **sizes)
    check(data.device == device, f"{name}.data must be on {device} as x is, got {data.device}")
    return data, run


def given(data: Tensor | None, run: int) -> Statistics | None:
    """Return the statistics that an operator got in two arguments. Raises InputError for what cannot be any."""
    return None if data is None else Statistics(data, run)


def fill_statistics(x: Tensor, data: Tensor | None, run: int) -> None:
    """Fills data with the statistics of x (B, P, C) by plain PyTorch, unless data is None."""
    if data is None:
        return
    for i, part in enumerate(x.double().split(run, dim=1)):
        variance, mean = torch.var_mean(part, dim=1, correction=0)
        single = mean.float()
        planes = (single, mean - single, variance * part.shape[1], part.amin(1), part.amax(1))
        data[:, i] = torch.stack([plane.float() for plane in planes], dim=1)
