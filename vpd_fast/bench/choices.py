"""Times of the operators' implementations, by which "auto" chooses on a GPU: measured, or from stored results."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vpd_fast import ops
from vpd_fast.bench.engine_pass import MODELS, Label, labelled
from vpd_fast.bench.operations import ValuesAreFine, empty_engine
from vpd_fast.bench.parity import make_images
from vpd_fast.errors import InputError
from vpd_fast.kernels import _library, tables
from vpd_fast.kernels._gemm_cuda import alignment_refuses
from vpd_fast.ops._dispatch import Implementation, Op

Key = tuple[str, str, tuple[int, ...]]  # operator, key and sizes of `_choices.Shape`
Microseconds = dict[str, float]
Handler = Callable[[Op, Any], Any]
PRODUCTS = ("linear", "conv2d")
MAX_BEHIND = 1.5  # times of the fastest that Triton's product may take for its tiles to be measured


def key_of(op: Op, arguments: Any) -> Key:
    """Return under what the times of a call are stored."""
    assert op.shape is not None
    shape = op.shape(arguments)
    return op.measured_as or op.name, shape.key, shape.sizes


class OperatorCalls(TorchDispatchMode):
    """While it is on, `handle(op, arguments)` computes what is left to "auto" of operators whose times are recorded."""

    def __init__(self, handle: Handler) -> None:
        super().__init__()
        self._handle = handle

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        schema = func._schema
        namespace, _, name = schema.name.partition("::")
        op = ops.registry().get(name) if namespace == "vpd_fast" else None
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | (kwargs or {})
        if op is None or op.shape is None or given.pop("impl") != "auto":
            return func(*args, **(kwargs or {}))
        return self._handle(op, op.arguments(**given))


class ImplementationTimes:
    """Measures the implementations of operators; its `compute` is for `OperatorCalls`.

    known: what is not measured again. deadline: of time.monotonic(), after which nothing is measured.
    measure: takes a function and returns the milliseconds of a call. after: called after every shape.
    """

    def __init__(
        self, known: dict[Key, Microseconds], deadline: float, measure: Callable[[Callable[[], Any]], float],
        after: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.found: dict[Key, Microseconds] = {}
        self.left_out: set[Key] = set()
        self._improved: set[Key] = set()
        self._known, self._deadline, self._measure, self._after = known, deadline, measure, after

    def compute(self, op: Op, arguments: Any) -> Any:
        """The result, by the fastest implementation, once all that can compute it have been measured."""
        candidates = [i for i in op.implementations[:-1] if i.refuse(arguments) is None]
        key = key_of(op, arguments)
        if not self.times(op, arguments) and len(candidates) > 1:
            if time.monotonic() > self._deadline:
                self.left_out.add(key)
            elif times := self._times(op, arguments):
                self.found[key] = times
                self._after()
        return self.fastest(op, arguments).run(arguments)

    def times(self, op: Op, arguments: Any) -> Microseconds:
        """What is known of a call, {} if that is nothing."""
        key = key_of(op, arguments)
        return self.found.get(key) or self._known.get(key) or {}

    def fastest(self, op: Op, arguments: Any) -> Implementation:
        """The implementation that was fastest, or the first of the list."""
        candidates = [i for i in op.implementations if i.refuse(arguments) is None]
        times = self.times(op, arguments)
        return min(candidates, key=lambda i: times.get(i.name, float("inf")))

    def improve(self, op: Op, arguments: Any, tiles: Callable[[], AbstractContextManager], measured: Sized) -> Any:
        """The result, once Triton's product has the best tiles, and was measured again if these are new.

        tiles: makes the context in which tiles are measured and chosen. measured: grows by those that are measured.
        Where Triton's product took more than MAX_BEHIND times as long as another implementation, none are: no tile
        would make it the fastest.
        """
        key, times, triton = key_of(op, arguments), self.times(op, arguments), op.by_name.get("triton")
        worthwhile = not times or times.get("triton", float("inf")) <= MAX_BEHIND * min(times.values())
        if op.name in PRODUCTS and triton and worthwhile and key not in self._improved and not triton.refuse(arguments):
            if time.monotonic() > self._deadline:
                self.left_out.add(key)
            else:
                self._improved.add(key)
                before = len(measured)
                with _restored(op, arguments), tiles():
                    triton.run(arguments)
                    if times and len(measured) > before:
                        self.found[key] = {**times, "triton": 1e3 * self._measure(lambda: triton.run(arguments))}
                self._after()
        return self.fastest(op, arguments).run(arguments)

    def _times(self, op: Op, arguments: Any) -> Microseconds:
        times: Microseconds = {}
        with _restored(op, arguments):
            for candidate in op.implementations[:-1]:
                if candidate.refuse(arguments) is not None:
                    continue
                try:
                    candidate.run(arguments)  # compiles it
                    times[candidate.name] = 1e3 * self._measure(lambda run=candidate.run: run(arguments))
                except Exception as error:  # what a library cannot compute, or not in a CUDA graph
                    if isinstance(error, torch.AcceleratorError):
                        raise
        return times


@contextmanager
def _restored(op: Op, arguments: Any) -> Iterator[None]:
    """What is written in the context, and may be an input, too, is afterwards as it was."""
    schema = getattr(torch.ops.vpd_fast, op.name).default._schema
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    kept = [(t, t.clone()) for name in written if (t := getattr(arguments, name)) is not None]
    yield
    for tensor, before in kept:
        tensor.copy_(before)


def to_rows(times: dict[Key, Microseconds], sources: dict[Key, str] | None = None) -> list[dict[str, Any]]:
    """The rows of a table's `choices`, the fastest implementation of each first."""
    rows = []
    for operator, key, sizes in sorted(times):
        found = times[operator, key, sizes]
        us = {name: round(found[name], 2) for name in sorted(found, key=lambda name: (found[name], name))}
        row = {"operator": operator, "key": key, "sizes": list(sizes), "us": us}
        source = (sources or {}).get((operator, key, sizes))
        rows.append(row | ({"source": source} if source else {}))
    return rows


# --- from stored results ----------------------------------------------------------------------------------------------


def table_of_results(paths: Iterable[Path]) -> dict[str, Any]:
    """The table that stored results give: facts, `configs` (none) and `choices`, as its file has them.

    Of `rows` (`benchmarks/layers.py`) those with `products` count: the implementation that products were computed by,
    or by Triton where it refused. A part is several layers, whose shapes all get the mean time of its calls.
    `operators` are times of single operators. Raises InputError for files that are no such results, or not of one GPU.
    """
    facts: dict[str, Any] = {}
    layers: list[dict[str, Any]] = []
    times: dict[Key, Microseconds] = {}
    sources: dict[Key, str] = {}
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            environment = content["environment"]
            gpu = {"device": environment["device"], "capability": list(environment["capability"])}
            layers += [row for row in content.get("rows", []) if "products" in row]
            for row in content.get("operators", []):
                op, arguments = _call(row)
                key = key_of(op, arguments)
                times[key] = {name: float(us) for name, us in row["us"].items() if name in op.by_name}
                sources[key] = path.name
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{path} has no times of a GPU's layers or operators ({error!r})") from error
        if any(facts.get(name, value) != value for name, value in gpu.items()):
            raise InputError(f"{path} is of {gpu['device']}, others are of {facts['device']}; give files of one GPU")
        facts |= gpu | {name: environment[name] for name in ("torch", "triton", "time") if name in environment}
    if not facts:
        raise InputError("there are no files to take times from")
    of_layers, parts = times_of_layers(layers)
    return {**facts, "configs": [], "choices": to_rows(of_layers | times, parts | sources)}


def _call(row: dict[str, Any]) -> tuple[Op, Any]:
    """The call that a row of `operators` is of."""
    op, dtype = ops.registry()[row["operator"]], getattr(torch, row["dtype"])

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if row["operator"] == "upsample_argmax":
        return op, op.bind(empty(*row["logits"]), tuple(row["size"]))
    width = row["heads"] * row["dim"]
    q = empty(row["batch"], row["queries"], width)
    k = empty(row["batch"], row.get("tokens", row["queries"]), width)
    return op, op.bind(q, k, k, row["heads"])


def times_of_layers(rows: list[dict[str, Any]]) -> tuple[dict[Key, Microseconds], dict[Key, str]]:
    """Times of products by implementation, and the parts that they are of; see `table_of_results`."""
    runs: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        runs[row["precision"], row["size"], row.get("batch", 1), row.get("model", "full")].append(row)
    sums: dict[Key, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
    sources: dict[Key, str] = {}
    for run, found in runs.items():
        if len({row["products"] for row in found}) == 1:
            continue  # with nothing to compare with
        shapes = shapes_of_parts(*run)
        for row in found:
            part = row["stage"], row["part"], row["in"]
            calls = shapes.get(part, {})
            # Layers of a part that are not computed by one implementation have no times of their own.
            by = {row["products"] if row["products"] in takes else "triton" for takes in calls.values()}
            for key in calls if len(by) == 1 else ():
                total = sums[key][next(iter(by))]
                total[0], total[1] = total[0] + 1e3 * row["ms"], total[1] + row["calls"]
                sources[key] = f"layers: {' '.join(part[:2])}"
    times = {key: {name: us / n for name, (us, n) in by.items()} for key, by in sums.items() if len(by) > 1}
    return times, {key: sources[key] for key in times}


def shapes_of_parts(
    precision: str, size: int, batch: int, model: str
) -> dict[tuple[str, str, str], dict[Key, frozenset[str]]]:
    """Products of a pass by stage, part and precision, and the implementations that take their sizes."""
    found: dict[tuple[str, str, str], dict[Key, frozenset[str]]] = defaultdict(dict)
    current: list[Label] = []

    def around(label: Label, call: Callable[[], Any]) -> Any:
        current.append(label)
        try:
            return call()
        finally:
            current.pop()

    def note(op: Op, arguments: Any) -> Any:
        if op.name in PRODUCTS and current:
            label = current[-1]
            found[label.stage, label.part, label.precision][key_of(op, arguments)] = _takers(arguments)
        return op.fake(arguments)

    engine, images = empty_engine(MODELS[model], precision, "cuda"), make_images(batch, size).to("meta")
    with labelled(engine) as run, torch.no_grad(), ValuesAreFine():
        run.prepare(batch)
        with OperatorCalls(note):
            run(images, around)
    return found


def _takers(call: Any) -> frozenset[str]:
    """Which implementations of a product take its sizes, wherever its tensors are."""
    reasons = {
        "triton": None,
        "cuda": alignment_refuses(call.x, call.x2, call.data.dtype, call.has_prologue),
        "library": _library.refuse(call),
    }
    return frozenset(name for name, reason in reasons.items() if reason is None)


def known_times(table: tables.Table) -> dict[Key, Microseconds]:
    """What a table says was measured for shapes alone, not taken from stored results."""
    return {
        (operator, key, times.sizes): dict(times.microseconds)
        for (operator, key), recorded in table.choices.items()
        for times in recorded
        if not times.source
    }
