"""Whole segmentation forward passes with random weights: time and peak memory per precision and attention backend.

python benchmarks/e2e.py --device cuda --batch 1 8 --size 512 --backends sdpa xformers flash-attn
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from timing import device_name, measure, rows_of, table, write_rows

from vpd_fast import VPD, VPDConfig
from vpd_fast.benchmark.environment import peak_bytes, reset_peak
from vpd_fast.benchmark.parity import cosine
from vpd_fast.errors import InputError
from vpd_fast.models.attention_backends import BACKENDS, PLAIN
from vpd_fast.models.random_weights import randomize

# Of autocast, if any, and the least cosine of the logits to the baseline's: no time is reported below it.
PRECISIONS = {"fp32": (None, 0.99999), "bf16 autocast": (torch.bfloat16, 0.999)}
BASELINE = f"fp32 {PLAIN}"


def with_backend(model: VPD, backend: str) -> VPD:
    """A model of the same parameters, in the same memory."""
    other = VPD.empty(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    other.attention_backend = backend
    return other.eval()


def forward(model: VPD, images: torch.Tensor, dtype: torch.dtype | None) -> Callable[[], torch.Tensor]:
    """A call of the model that returns logits, under autocast if a dtype is given."""

    def run() -> torch.Tensor:
        cast = torch.autocast(images.device.type, dtype) if dtype else contextlib.nullcontext()
        with torch.inference_mode(), cast:
            return model(images)

    return run


def logits_and_peak_gib(device: str, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """The logits of one call and the peak memory meanwhile: of the GPU, or of the process (Linux)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        logits = run()
        torch.cuda.synchronize()
        return logits, torch.cuda.max_memory_allocated() / 2**30
    reset_peak()
    logits = run()
    return logits, peak_bytes() / 2**30


def measured_rows(models: dict[str, VPD], images: torch.Tensor, rounds: int) -> list[dict[str, Any]]:
    """One row per precision and backend. Exits if their logits do not agree with the baseline's."""
    device = images.device.type
    expected, facts, labels = None, {}, {}
    for (precision, (dtype, least)), (backend, model) in itertools.product(PRECISIONS.items(), models.items()):
        name, run = f"{precision} {backend}", forward(model, images, dtype)
        try:
            logits, peak = logits_and_peak_gib(device, run)
        except InputError as error:
            print(f"left out: {name}: {error}")
            continue
        expected = logits if expected is None else expected  # the baseline comes first
        similarity = cosine(logits, expected)
        if not similarity >= least:
            sys.exit(f"{name} does not agree with {BASELINE}, so times mean nothing: cosine {similarity} < {least}")
        facts[name] = {"peak_gib": round(peak, 2), "cosine": round(similarity, 6)}
        labels[name] = lambda run=run: run().argmax(1)
    times = measure(labels, device, rounds=rounds, seconds=120)
    case = "x".join(map(str, images.shape))
    rows = rows_of(times, BASELINE, case=case, threads=torch.get_num_threads())
    return [row | {"ms_per_image": round(row["p50_ms"] / len(images), 3)} | facts[row["variant"]] for row in rows]


def main() -> None:
    """Measures, prints a table and stores the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels, a multiple of 64")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--backends", choices=BACKENDS[1:], nargs="+", default=["sdpa"], help="besides plain")
    options = parser.parse_args()

    model = randomize(VPD(VPDConfig(task="segmentation", num_classes=150)), seed=0).eval().to(options.device)
    models = {PLAIN: model} | {backend: with_backend(model, backend) for backend in options.backends}
    rows = []
    for batch in options.batch:
        images = torch.rand(batch, 3, options.size, options.size, device=options.device) * 2 - 1
        rows += measured_rows(models, images, options.rounds)
    path = write_rows("e2e", options.device, rows)
    print(f"segmentation model on {device_name(options.device)}, random weights: {path}")
    print(table(rows))


if __name__ == "__main__":
    main()
