"""Whole segmentation forward passes of the plain model with random weights: time and peak memory per precision.

python benchmarks/e2e.py --device cuda --batch 1 8 --size 512
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timing import device_name, measure, rows_of, table, write_rows

from vpd_fast import VPD, VPDConfig
from vpd_fast.models.random_weights import randomize

PRECISIONS = {"fp32": None, "bf16 autocast": torch.bfloat16}
LEAST_COSINE = 0.999  # of the logits to float32's: no time is reported below it


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
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    logits = run()
    peak_kib = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    return logits, int(peak_kib) / 2**20


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine of the angle between two tensors."""
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


def main() -> None:
    """Measures, prints a table and stores the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels, a multiple of 64")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()

    model = randomize(VPD(VPDConfig(task="segmentation", num_classes=150)), seed=0).eval().to(options.device)
    rows = []
    for batch in options.batch:
        images = torch.rand(batch, 3, options.size, options.size, device=options.device) * 2 - 1
        variants = {name: forward(model, images, dtype) for name, dtype in PRECISIONS.items()}
        first = {name: logits_and_peak_gib(options.device, run) for name, run in variants.items()}
        cosines = {name: cosine(logits, first["fp32"][0]) for name, (logits, _) in first.items()}
        if min(cosines.values()) < LEAST_COSINE:
            sys.exit(f"the precisions do not agree, so their times mean nothing; cosines to float32: {cosines}")
        labels = {name: lambda run=run: run().argmax(1) for name, run in variants.items()}
        times = measure(labels, options.device, rounds=options.rounds, seconds=120)
        case = f"{batch}x3x{options.size}x{options.size}"
        measured = rows_of(times, "fp32", case=case, threads=torch.get_num_threads())
        for row in measured:
            row["ms_per_image"] = round(row["p50_ms"] / batch, 3)
            row["peak_gib"] = round(first[row["variant"]][1], 2)
            row["cosine"] = round(cosines[row["variant"]], 6)
        rows += measured
    path = write_rows("e2e", options.device, rows)
    print(f"plain segmentation model on {device_name(options.device)}, random weights: {path}")
    print(table(rows))


if __name__ == "__main__":
    main()
