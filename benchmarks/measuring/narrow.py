"""The first convolutions of the encoder and of the UNet, whose images have few channels, by implementation."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from measuring.plan import Row, Step
from measuring.setting import Setting
from vpd_fast.ops import PackedWeight, Statistics, conv2d
from vpd_fast.ops.statistics import run_length, statistics_shape

IMPLEMENTATIONS = ("cuda_rows", "triton", "library")
SHAPES = ((8, 512, 3, 128), (8, 64, 4, 320), (1, 512, 3, 128), (1, 64, 4, 320))  # images, side, channels, columns
# Predicted for "cuda_rows": its bytes at a rate that memory has reached, and what starting a kernel takes.
GB_PER_S, START_MS = 2600.0, 0.004


def steps(setting: Setting) -> Iterator[Step]:
    """A step for each shape, of 3x3 positions, with statistics of the result."""
    for shape in setting.only(list(SHAPES)):
        yield Step("x".join(map(str, shape)), functools.partial(_at, setting, (1, 8, 3, 16) if setting.dry else shape))


def _at(setting: Setting, shape: tuple[int, int, int, int]) -> list[Row]:
    batch, side, channels, n = shape
    x, bias = setting.random(batch, side, side, channels), setting.random(n)
    weight = PackedWeight.pack(setting.random(1, n, 9 * channels).cpu(), torch.bfloat16).for_device(setting.device)
    out = torch.empty(batch, side, side, n, dtype=torch.bfloat16, device=setting.device)
    data = setting.random(*statistics_shape(batch, side * side, n))
    statistics = Statistics(data, run_length(side * side))
    shared = {"kernel": (3, 3), "padding": 1, "out": out}
    calls: dict[str, Callable[[], Any]] = {}
    for name in IMPLEMENTATIONS:
        calls[name] = functools.partial(conv2d, x, weight, bias, impl=name, **shared)
        calls[f"{name}, statistics"] = functools.partial(
            conv2d, x, weight, bias, impl=name, statistics=statistics, **shared
        )
    usable, reasons = setting.possible(calls)
    facts = {"shape": "x".join(map(str, shape))}
    predicted = START_MS + 1e-6 * (x.nbytes + out.nbytes + math.prod(data.shape) * 4) / GB_PER_S
    rows: list[Row] = []
    for name, ms in setting.milliseconds(usable).items():
        row = {**facts, "implementation": name, "ms": ms}
        rows.append(row | ({"predicted_ms": predicted} if name.startswith("cuda_rows") else {}))
    return rows + [{**facts, "implementation": name, "not run": reason} for name, reason in reasons.items()]
