"""Images per second of a fast model on a CPU, without and with graphs, one batch after the other and in streams.

`python benchmarks/cpu_throughput.py [--checkpoint NAME | --size N] [--precision P] [--batch-sizes N ...]` prints
images per second and milliseconds of processors per image, of the model alone: for an image of 640x480 pixels and a
bundled miniature, or for one window and a full-size segmentation model with random weights (--size). Medians of runs
that take turns.
"""

from __future__ import annotations

import argparse
import statistics
from itertools import product
from typing import Any

import numpy as np
import torch

import vpd_fast
from vpd_fast import VPD, VPDConfig
from vpd_fast.bench.pipeline import model_alone
from vpd_fast.bench.timing import table
from vpd_fast.inference import make_predictor
from vpd_fast.models.random_weights import randomize


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="shapes-segmentation")
    parser.add_argument("--size", type=int, help="of the window of a full-size model with random weights")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=1.0, help="least time of a run")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.size:
        config = VPDConfig(base_size=arguments.size)
        plain, shape = randomize(VPD.empty(config), 0).eval(), (arguments.size, arguments.size, 3)
    else:
        plain, shape = VPD.from_checkpoint(arguments.checkpoint), (480, 640, 3)
    model = vpd_fast.optimize(plain, arguments.precision)
    del plain
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    streams = sorted({1, torch.get_num_threads()})
    rows: list[dict[str, Any]] = []
    for batch in arguments.batch_sizes:
        predictor = make_predictor(model, batch_size=batch)
        ways = [*product((False, True), streams)]
        found: dict[tuple[bool, int], list[tuple[float, float]]] = {way: [] for way in ways}
        for _, way in product(range(arguments.rounds), ways):
            model.graphs = way[0]
            found[way].append(model_alone(predictor, image, way[1], arguments.seconds))
        for way, runs in found.items():
            speed, spent = map(statistics.median, zip(*runs, strict=True))
            numbers = {"images/s": f"{speed:.3g}", "core-ms per image": f"{spent:.1f}"}
            rows.append({"batch": batch, "graphs": way[0], "streams": way[1], **numbers})
    print(table(rows))


if __name__ == "__main__":
    main()
