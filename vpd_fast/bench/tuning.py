"""Measuring which configuration of every matrix product of a model is fastest on a GPU; `vpd-fast tune`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import vpd_fast
from vpd_fast.bench.environment import environment
from vpd_fast.bench.timing import L2_FLUSH_BYTES, as_graph, seconds_on_gpu
from vpd_fast.bench.variants import Case, ModelVariant
from vpd_fast.config import VPDConfig
from vpd_fast.errors import MissingDependencyError
from vpd_fast.files import write_files
from vpd_fast.models import VPD
from vpd_fast.models.random_weights import randomize
from vpd_fast.ops import upsample_argmax
from vpd_fast.ops.availability import triton_missing

REPLAYS = 9
Config = dict[str, int]


def milliseconds(run: Callable[[], None]) -> float:
    """Time of one call in ms, with a cold L2 cache, as a CUDA graph, so that launching it does not count."""
    replay = as_graph(run)
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    return 1e3 * median(seconds_on_gpu(replay, flush) for _ in range(REPLAYS))


class Measurements:
    """What was measured of each product; decides within `vpd_fast.kernels.tuning.tuning`.

    known: products that are not measured again. deadline: of time.monotonic(), after which nothing is measured.
    """

    def __init__(
        self, known: dict[str, dict[int, Config]], processors: int, deadline: float,
        measure: Callable[[Callable[[], None]], float] = milliseconds,
    ) -> None:  # fmt: skip
        self.found: dict[Any, list[tuple[Config, float]]] = {}
        self.left_out = 0  # products for which there was no time
        self._known, self._processors, self._deadline, self._measure = known, processors, deadline, measure

    def choose(self, product: Any, run: Callable[[Config], None]) -> Config:
        """The fastest configuration. The product's result is what the last of them computed."""
        from vpd_fast.kernels import tuning

        if product in self.found:
            return self.found[product][0][0]
        recorded = self._known.get(product.key, {}).get(product.rows)
        if recorded is not None or time.monotonic() > self._deadline:
            self.left_out += recorded is None
            return recorded or tuning.by_rule(product, self._processors)
        times = []
        for config in tuning.candidates(product, self._processors):
            try:
                times.append((config, self._measure(lambda config=config: run(config))))
            except Exception as error:  # too much shared memory, or not what the library can compute
                if isinstance(error, torch.AcceleratorError):
                    raise
        self.found[product] = sorted(times, key=lambda pair: pair[1])
        return self.found[product][0][0]


def tune(
    path: Path,
    config: VPDConfig,
    precisions: list[str],
    batches: list[int],
    sizes: list[int],
    seconds: float,
    again: bool,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Measure the products of models with random weights and write the table to `path`, after every model.

    config: of the model. seconds: after which what is not measured is left to the rule. again: measure what the table
    has already. report: is told of progress. Returns the table. Raises MissingDependencyError without a GPU for Triton.
    """
    if not torch.cuda.is_available():
        raise MissingDependencyError("tuning measures kernels on an NVIDIA GPU, and PyTorch finds none")
    device = torch.device("cuda")
    reason = triton_missing(torch.empty(0, device=device))
    if reason is not None:
        raise MissingDependencyError(f"tuning measures Triton kernels, which cannot run: {reason}")
    from vpd_fast.kernels import tuning
    from vpd_fast.kernels.tuning import multiprocessors

    known = tuning.read(path) if path.is_file() and not again else {}
    kept = json.loads(path.read_text(encoding="utf-8"))["configs"] if known else []
    measurements = Measurements(known, multiprocessors(device), time.monotonic() + seconds)
    model = randomize(VPD(config), seed=0).eval().to(device)
    table: dict[str, Any] = {}
    for precision in precisions:
        variant = ModelVariant(vpd_fast.optimize(model, precision), upsample_argmax, graphs=False)
        for batch in batches:
            for size in sizes:
                start, before = time.monotonic(), len(measurements.found)
                variant.prepare(Case(size, batch))
                with tuning.tuning(measurements.choose):
                    variant.run()
                table = tuning.to_json(measurements.found, environment("cuda"))
                table["configs"] = kept + table["configs"]
                text = json.dumps(table, indent=1) + "\n"
                write_files({path: lambda temporary, text=text: temporary.write_text(text, encoding="utf-8")})
                new = len(measurements.found) - before
                report(f"{precision} {batch}x{size}x{size}: {new} products in {time.monotonic() - start:.0f} s")
        del variant
    if measurements.left_out:
        report(f"{measurements.left_out} products were left to the rule after {seconds:.0f} s; run it again for them")
    return table
