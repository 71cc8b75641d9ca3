"""Preparing rows and finding statistics, at the sizes of a pass."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from measuring.plan import Row, Step
from measuring.products import PRECISIONS
from measuring.setting import STAND_IN, Setting
from measuring.shapes import calls_of_pass

COUNT = 6  # sizes with the most bytes
GROUPS = 32
Size = tuple[int, int, int, int]  # B, H, W, C


def steps(setting: Setting) -> Iterator[Step]:
    """A step for each size: rows by precision and implementation, statistics and their merge."""
    sizes: Counter[Size] = Counter()
    for name, call in calls_of_pass(setting, 1 if setting.dry else 8):
        if name == "conv2d" and call.has_prologue:
            sizes[tuple(map(int, call.x.shape))] += 1
    for size, count in setting.only(sorted(sizes.items(), key=lambda pair: -_numbers(pair[0]) * pair[1])[:COUNT]):
        yield Step(
            "x".join(map(str, size)), functools.partial(_at, setting, (1, 4, 4, 8) if setting.dry else size, count)
        )


def _numbers(size: Size) -> int:
    batch, height, width, channels = size
    return batch * height * width * channels


IMPLEMENTATIONS = ("triton", "cuda")  # what prepares rows
# Predicted for "cuda": bytes of a pass over memory at this rate, as instructions and exponentials take less.
PREDICTED_GB_PER_S = 3500.0
# Predicted for merging statistics: a launch that waits for memory once, and three of five planes read.
PREDICTED_MERGE_MS = 0.003
READ_PLANES = 3 / 5
LONGER_RUNS = (2, 8)  # times as long, to see what they would be worth


def _at(setting: Setting, size: Size, count: int) -> list[Row]:
    from vpd_fast.kernels._prologue import prepare
    from vpd_fast.kernels._statistics import partial
    from vpd_fast.ops import Statistics, group_norm_affine
    from vpd_fast.ops.statistics import run_length, statistics_shape

    batch, height, width, channels = size
    x = setting.random(*size, dtype=torch.bfloat16)
    affine = setting.random(batch, 2, channels)
    ranges = torch.tensor([-4.0, 4.0], device=setting.device).view(1, 2, 1).repeat(batch, 1, 1)
    positions = height * width
    run = run_length(positions)
    data = torch.empty(statistics_shape(batch, positions, channels), device=setting.device)
    statistics = {"merge": Statistics(data, run)}
    for length in (run * times for times in LONGER_RUNS if data.shape[1] % times == 0):
        statistics[f"merge, runs of {length}"] = Statistics(data[:, : positions // length].contiguous(), length)
    weight, bias = torch.ones(channels, device=setting.device), torch.zeros(channels, device=setting.device)
    rounded = {"padding": (1, 1, 1, 1), "scale_shift": affine, "silu": True, "per_image": True}
    calls: dict[str, Callable[[], Any]] = {}
    predicted: dict[str, float] = {}
    padded = batch * (height + 2) * (width + 2) * channels
    for implementation in IMPLEMENTATIONS:
        # Kernels in CUDA C++ need a GPU.
        by = functools.partial(prepare, x, None, backend="triton" if setting.dry else implementation, **rounded)
        for precision, dtype in PRECISIONS.items():
            known = {"ranges": ranges} if dtype == torch.int8 else {}
            what = f"rows {precision} {implementation}"
            calls[what] = functools.partial(by, dtype=dtype, **known)
            if implementation == "cuda":
                predicted[what] = 1e-6 * (x.nbytes + padded * dtype.itemsize) / PREDICTED_GB_PER_S
        calls[f"rows int8 {implementation}, ranges searched"] = functools.partial(by, dtype=torch.int8)
    calls["statistics"] = lambda: partial(x.flatten(1, 2), run, data)
    impl = {"impl": "triton"}
    groups = GROUPS if channels % GROUPS == 0 else 1
    for what, known in statistics.items():
        calls[what] = functools.partial(group_norm_affine, x, weight, bias, groups, 1e-5, statistics=known, **impl)
        predicted[what] = PREDICTED_MERGE_MS + 1e-6 * READ_PLANES * known.data.nbytes / PREDICTED_GB_PER_S
    calls["statistics and merge"] = lambda: group_norm_affine(x, weight, bias, groups, 1e-5, **impl)
    usable, reasons = setting.possible(calls)
    facts = {"size": "x".join(map(str, size)), "calls": count}
    times = setting.milliseconds(usable)
    rows = []
    for what, ms in times.items():
        row = {**facts, "what": what, "ms": ms, "read_gb_per_s": 1e-6 * x.nbytes / ms}
        row |= {"predicted_ms": predicted[what]} if what in predicted else {}
        rows.append(row | ({STAND_IN: "triton"} if setting.dry and " cuda" in what else {}))
    return rows + [{**facts, "what": what, "not run": reason} for what, reason in reasons.items()]
