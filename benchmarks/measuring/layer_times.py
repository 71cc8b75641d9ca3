"""Times layer by layer, as `layers.py` measures them, of the two configurations that matter most."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import layers
import torch

import vpd_fast
from measuring.plan import Row, Step
from measuring.setting import Setting
from vpd_fast.bench.engine_pass import MODELS, labelled
from vpd_fast.bench.parity import make_images

ROUNDS = 5
ROWS = 40  # the longest parts; what is left is one row


def steps(setting: Setting) -> Iterator[Step]:
    """One step for each precision, at the batch of the highest throughput."""
    for precision in setting.only(["int8", "bf16"]):
        yield Step(precision, functools.partial(_parts, setting, precision, 1 if setting.dry else 8), 45)


def _parts(setting: Setting, precision: str, batch: int) -> list[Row]:
    config = MODELS[setting.model_name]
    images = make_images(batch, setting.size).to(setting.device)
    with labelled(vpd_fast.optimize(setting.plain, precision)) as run, torch.inference_mode():
        run(images)  # warm up
        timed = layers.timed_on_cpu(run, images) if setting.dry else layers.timed_on_gpu(run, images, ROUNDS)
    counts = layers.counted(config, precision, setting.device, images)
    rows = layers.summary([timed], counts, {}, {"precision": precision, "batch": batch})
    rest = rows[ROWS:]
    if rest:
        total = sum(row["ms"] for row in rest)
        rows[ROWS:] = [{"precision": precision, "batch": batch, "part": f"{len(rest)} others", "ms": total}]
    return rows
