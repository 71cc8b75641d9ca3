"""What `accelerate` makes of the original's model: seconds per image before and after, beside our own model.

`python benchmarks/accelerated_original.py [--size 512] [--rounds 3] [--device cpu]` runs segmentation at full size with
random weights, on a model with the original's structure (tests/interop/original_models.py). Rounds of the ways
alternate; printed are medians, their ratio to the original's, and the relative difference of the logits.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.interop.original_models import VPDSeg
from vpd_fast import VPD, VPDConfig, accelerate, optimize, restore
from vpd_fast.bench.timing import table

ORIGINAL = "the original"


def ways(size: int, device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return, by name, what computes the logits of an image, all with the same weights."""
    torch.manual_seed(0)
    config = VPDConfig(base_size=size)
    model = VPDSeg(config).to(device).eval()
    torch.nn.init.normal_(model.class_embeddings)
    own = VPD.empty(config)
    own.load_state_dict(model.state_dict(), assign=True)
    own.eval().attention_backend = "sdpa"
    engine = optimize(own, "fp32")

    def accelerated(precision: str | None) -> Callable[[Tensor], Tensor]:
        def run(images: Tensor) -> Tensor:
            return model.encode_decode(images, None)

        run.prepare = lambda: accelerate(model, precision)
        return run

    return {
        ORIGINAL: lambda images: model.encode_decode(images, None),
        "accelerate(model)": accelerated(None),
        "our plain model, sdpa": own,
        'accelerate(model, "fp32")': accelerated("fp32"),
        'our engine, "fp32"': engine,
    }


def timed(run: Callable[[Tensor], Tensor], images: Tensor) -> tuple[float, Tensor]:
    """Return the seconds and what came out."""
    synchronize = torch.cuda.synchronize if images.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    found = run(images)
    synchronize()
    return time.perf_counter() - start, found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="height and width of the image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")  # of the original's checkpoints
    images = torch.rand(1, 3, options.size, options.size, device=options.device) * 2 - 1
    variants = ways(options.size, options.device)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    logits: dict[str, Tensor] = {}
    with torch.inference_mode():
        for _ in range(1 + options.rounds):  # the first warms up
            for name, run in variants.items():
                patched = run.prepare() if hasattr(run, "prepare") else None
                if patched is not None and '"' in name:
                    run(images)  # an engine's first call is another
                taken, logits[name] = timed(run, images)
                seconds[name].append(taken)
                if patched is not None:
                    restore(patched)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    first = logits[ORIGINAL]
    rows = [
        {
            "way": name,
            "s/image": f"{medians[name]:.2f}",
            "of the original": f"{medians[name] / medians[ORIGINAL]:.2f}",
            "difference": f"{((logits[name] - first).norm() / first.norm()).item():.1e}",
        }
        for name in variants
    ]
    print(table(rows))


if __name__ == "__main__":
    main()
