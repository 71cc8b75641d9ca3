"""Labels of a segmentation, enlarged eight times, by implementation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from measuring.plan import Row, Step
from measuring.setting import Setting
from vpd_fast.ops import upsample_argmax

IMPLEMENTATIONS = ("cuda", "cuda_strips", "triton")
SHAPES = ((8, 150, 64, 64), (1, 150, 64, 64), (8, 2, 64, 64))
ENLARGEMENT = 8
# Predicted for "cuda_strips": machine instructions per pixel and channel, as many a second as an H200 issues.
INSTRUCTIONS, PER_SECOND = 7.3, 128 * 132 * 1.7e9


def steps(setting: Setting) -> Iterator[Step]:
    """A step for each shape of logits, which are as heads leave them, channels last."""
    for shape in setting.only(list(SHAPES)):
        yield Step("x".join(map(str, shape)), functools.partial(_at, setting, (1, 3, 4, 4) if setting.dry else shape))


def _at(setting: Setting, shape: tuple[int, int, int, int]) -> list[Row]:
    batch, channels, height, width = shape
    logits = setting.random(*shape).contiguous(memory_format=torch.channels_last)
    size = ENLARGEMENT * height, ENLARGEMENT * width
    calls: dict[str, Callable[[], Any]] = {
        name: functools.partial(upsample_argmax, logits, size, impl=name) for name in IMPLEMENTATIONS
    }
    usable, reasons = setting.possible(calls)
    facts = {"logits": "x".join(map(str, shape))}
    rows: list[Row] = []
    for name, ms in setting.milliseconds(usable).items():
        rows.append({**facts, "implementation": name, "ms": ms})
        if name == "cuda_strips":
            rows[-1]["predicted_ms"] = 1e3 * INSTRUCTIONS * batch * channels * size[0] * size[1] / PER_SECOND
    return rows + [{**facts, "implementation": name, "not run": reason} for name, reason in reasons.items()]
