"""Measuring what computes the operators of a model fastest on a GPU, and with which tiles; `vpd-fast tune`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

import vpd_fast
from vpd_fast.bench import choices
from vpd_fast.bench.environment import environment
from vpd_fast.bench.timing import L2_FLUSH_BYTES, as_graph, seconds_on_gpu
from vpd_fast.bench.variants import Case, ModelVariant
from vpd_fast.config import VPDConfig
from vpd_fast.errors import InputError, MissingDependencyError
from vpd_fast.files import write_files
from vpd_fast.kernels import tables
from vpd_fast.kernels.tables import Config
from vpd_fast.models import VPD
from vpd_fast.models.random_weights import randomize
from vpd_fast.ops import upsample_argmax
from vpd_fast.ops.availability import triton_missing

REPLAYS = 9
SAVE_SECONDS = 20.0  # after which what was measured is written, also while a pass goes on


def milliseconds(run: Callable[[], Any]) -> float:
    """Time of one call in ms, with a cold L2 cache, as a CUDA graph, so that launching it does not count."""
    replay = as_graph(run)
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    return 1e3 * median(seconds_on_gpu(replay, flush) for _ in range(REPLAYS))


class Measurements:
    """What was measured of each product; decides within `vpd_fast.kernels.tuning.tuning`.

    known: products that are not measured again. deadline: of time.monotonic(), after which nothing is measured.
    """

    def __init__(
        self, known: Mapping[str, Mapping[int, Config]], processors: int, deadline: float,
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
            except Exception as error:  # too much shared memory
                if isinstance(error, torch.AcceleratorError):
                    raise
        if not times:
            return tuning.by_rule(product, self._processors)
        self.found[product] = sorted(times, key=lambda pair: pair[1])
        return self.found[product][0][0]


class TableFile:
    """A table's file that what was measured is written to: what it had stays, unless it was measured anew."""

    def __init__(self, path: Path, products: Measurements, operators: choices.ImplementationTimes, fresh: bool) -> None:
        self._path, self.products, self.operators = path, products, operators
        self._kept: dict[str, Any] = {} if fresh else json.loads(path.read_text(encoding="utf-8"))
        self._saved = time.monotonic()

    def content(self) -> dict[str, Any]:
        """What the file holds."""
        from vpd_fast.kernels import tuning

        configs, found = tuning.to_rows(self.products.found), choices.to_rows(self.operators.found)
        return {
            **environment("cuda"),
            "configs": _merged(self._kept.get("configs", []), configs, ("key", "rows")),
            "choices": _merged(self._kept.get("choices", []), found, ("operator", "key", "sizes")),
        }

    def save(self) -> dict[str, Any]:
        """Write the file and return what it holds."""
        content = self.content()
        write_files({self._path: lambda temporary: write_table(temporary, content)})
        self._saved = time.monotonic()
        return content

    def save_sometimes(self) -> None:
        """Write the file if that was long ago."""
        if time.monotonic() > self._saved + SAVE_SECONDS:
            self.save()


def _merged(old: list[dict[str, Any]], new: list[dict[str, Any]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    def key(row: dict[str, Any]) -> str:
        return json.dumps([row[name] for name in names])

    return [*{key(row): row for row in (*old, *new)}.values()]


def write_table(path: Path, content: dict[str, Any]) -> None:
    """Write a table with a line for each row, so that differences can be read."""
    head = {name: value for name, value in content.items() if name not in ("configs", "choices")}
    lists = [
        f' "{name}": [' + ",".join(f"\n  {json.dumps(row)}" for row in content[name]) + "\n ]"
        for name in ("configs", "choices")
    ]
    facts = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    path.write_text("{\n" + ",\n".join([*facts, *lists]) + "\n}\n", encoding="utf-8")


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
    """Measure the operators of models with random weights and write the table to `path`, again and again.

    Of each operator all implementations that can compute it are measured, then the tiles of those products of Triton's
    that were nearly the fastest.

    config: of the model. seconds: after which what is not measured is left to the rules. again: measure what the table
    has already; otherwise only what was taken from stored results. report: is told of progress. Returns the table.
    Raises MissingDependencyError without a GPU for Triton, and InputError for a table of another GPU.
    """
    if not torch.cuda.is_available():
        raise MissingDependencyError("tuning measures kernels on an NVIDIA GPU, and PyTorch finds none")
    device = torch.device("cuda", torch.cuda.current_device())
    reason = triton_missing(torch.empty(0, device=device))
    if reason is not None:
        raise MissingDependencyError(f"tuning measures Triton kernels, which cannot run: {reason}")
    from vpd_fast.kernels.tuning import multiprocessors

    fresh = again or not path.is_file()
    table = tables.Table(path) if fresh else tables.read(path)
    gpu = tables.gpu_of(device)
    if gpu is not None and not table.fits(gpu):
        raise InputError(f"{path} was measured on {table.gpu or 'another GPU'}, not on {gpu}; give another --out")
    deadline = time.monotonic() + seconds
    products = Measurements(table.configs, multiprocessors(device), deadline)
    operators = choices.ImplementationTimes(
        choices.known_times(table), deadline, milliseconds, lambda: file.save_sometimes()
    )
    file = TableFile(path, products, operators, fresh)
    model = randomize(VPD.empty(config), seed=0, device=device).eval()
    measure_models(file, model, precisions, [Case(size, batch) for batch in batches for size in sizes], report)
    left_out = products.left_out + len(operators.left_out)
    if left_out:
        report(f"{left_out} entries were left to the rules after {seconds:.0f} s; run it again for them")
    return file.content()


def measure_models(
    file: TableFile, model: VPD, precisions: list[str], cases: list[Case], report: Callable[[str], None]
) -> None:
    """Measure what passes of fast models call, implementations of all of them first, then tiles; write the file."""
    from vpd_fast.kernels import tuning

    products, operators = file.products, file.operators

    def improve(op: Any, arguments: Any) -> Any:
        return operators.improve(op, arguments, lambda: tuning.tuning(products.choose), products.found)

    for what, handle in (("implementations", operators.compute), ("tiles", improve)):
        for precision in precisions:
            variant = ModelVariant(vpd_fast.optimize(model, precision), upsample_argmax, graphs=False)
            for case in cases:
                start, before = time.monotonic(), len(products.found) + len(operators.found)
                variant.prepare(case)
                with choices.OperatorCalls(handle):
                    variant.run()
                file.save()
                new = len(products.found) + len(operators.found) - before
                report(f"{what}, {precision} {case}: {new} new entries in {time.monotonic() - start:.0f} s")
            del variant


def collect(path: Path, results: list[Path]) -> dict[str, Any]:
    """Write a table from stored results, see `choices.table_of_results`, and return it."""
    content = choices.table_of_results(results)
    write_files({path: lambda temporary: write_table(temporary, content)})
    return content
