"""Measuring variants of one computation side by side in this process, and keeping the results.

How times become numbers is in `vpd_fast.bench.statistics`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from vpd_fast.bench.environment import environment, kind_of_machine, peak_memory
from vpd_fast.bench.statistics import percentile
from vpd_fast.files import write_files, write_json

RESULTS = Path(os.environ.get("VPD_FAST_RESULTS", Path(__file__).parents[2] / "benchmarks" / "results"))
SAMPLE_SECONDS = 2e-3  # short computations are repeated until a sample takes this long
L2_FLUSH_BYTES = 256 << 20  # more than any GPU's L2 cache


def _seconds_cpu(function: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


class Stopwatch:
    """Seconds of stages that follow each other; on a GPU between events, which are waited for at the end."""

    def __init__(self, device: str = "cpu") -> None:
        self._now = time.perf_counter if device == "cpu" else _event
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def lap(self, stage: str) -> None:
        """End the stage that began with the last call."""
        self._marks.append((stage, self._now()))

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each stage; none while a CUDA graph is captured, when no event may be waited for."""
        if self._now is _event and torch.cuda.is_current_stream_capturing():
            return {}
        return {stage: _between(start, end) for (_, start), (stage, end) in pairwise(self._marks)}


class _TimeIsUp(BaseException):
    """Raised in the middle of anything, so it is no Exception, which compilers take for a candidate that failed."""


@contextmanager
def time_limit(seconds: float | None, what: str) -> Iterator[None]:
    """Raise TimeoutError when what is done in the context has taken so long; None: no limit.

    what: for the message. Only in the main thread, whose Python code is interrupted by a signal; a call of native code
    is over first.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    armed = True

    def stop(*_: Any) -> None:
        if armed:
            raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 30.0)  # again, should something have swallowed the first
    try:
        yield
        armed = False
    except _TimeIsUp:
        armed = False
        raise TimeoutError(f"{what} took longer than {seconds:g} s") from None
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    if isinstance(end, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def seconds_on_gpu(function: Callable[[], Any], flush: torch.Tensor | None) -> float:
    """One call between two events, with a cold L2 cache; without `flush`, with what the call before left in it."""
    if flush is not None:
        flush.zero_()
    watch = Stopwatch("cuda")
    function()
    watch.lap("")
    return watch.seconds[""]


def _as_graphs(variants: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """Each variant as the replay of a CUDA graph, so that the time is the GPU's and not that of launching kernels.

    If one cannot be captured, all are returned as they are: only like is compared with like.
    """
    replays = {}
    for name, function in variants.items():
        try:
            replays[name] = as_graph(function)
        except Exception as error:
            print(f"timed with launches, because {name} cannot be captured in a CUDA graph: {error}")
            return variants
    return replays


def as_graph(function: Callable[[], Any]) -> Callable[[], Any]:
    """The replay of a CUDA graph of the function's call. Raises what the capture raises."""
    stream, before = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):  # warm up
                function()
        before.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept = function()
    except Exception:
        torch.cuda.set_stream(before)  # a failed capture leaves its own
        torch.cuda.synchronize()
        raise
    return lambda graph=graph, kept=kept: graph.replay()  # which writes into the tensors of the capture


def measure(
    variants: dict[str, Callable[[], Any]],
    device: str = "cpu",
    rounds: int = 30,
    seconds: float = 20.0,
    graphs: bool = True,
    cold: bool = True,
    after: Callable[[str], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each variant, one number per round; the variants take turns within a round.

    graphs: on a GPU, replay CUDA graphs; False for what cannot be captured, such as copies from the host.
    cold: on a GPU, empty the L2 cache before every call. after: told the name of a variant after each of its turns.
    Stops after `rounds` rounds, or after `seconds` if at least three rounds are done.
    """
    names = list(variants)
    if device == "cuda":
        variants = _as_graphs(variants) if graphs else variants
        flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda") if cold else None
        sample = {name: lambda f=variants[name]: seconds_on_gpu(f, flush) for name in names}
        for _ in range(3):  # warm up
            for name in names:
                sample[name]()
    else:
        sample = {}
        for name in names:
            variants[name]()  # warm up
            repeats = max(1, int(SAMPLE_SECONDS / max(_seconds_cpu(variants[name], 1), 1e-9)))
            sample[name] = lambda f=variants[name], n=repeats: _seconds_cpu(f, n)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for turn in range(rounds):
        for i in range(len(names)):  # another variant goes first in every round
            name = names[(i + turn) % len(names)]
            times[name].append(sample[name]())
            if after is not None:
                after(name)
        if turn >= 2 and time.perf_counter() > end:
            break
    return times


def extra_memory(device: str, function: Callable[[], Any]) -> int:
    """Bytes that a call needs at its peak, beyond its result: of the GPU, or of the process (Linux)."""
    function()  # what is made once, such as workspaces, does not count
    result, before, peak = peak_memory(device, function)
    tensors = result if isinstance(result, (tuple, list)) else [result]
    return max(0, peak - before - sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor)))


def copy_gb_per_s(device: str) -> float:
    """Measured bandwidth of a large copy, reads and writes counted: the peak for memory-bound computations."""
    source = torch.ones(64 << 20, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    times = measure({"copy": lambda: target.copy_(source)}, device, rounds=10)["copy"]
    return 2 * source.numel() * 4 / percentile(times, 20) / 1e9


def write_rows(suite: str, device: str, rows: list[dict[str, Any]], **facts: Any) -> Path:
    """Write RESULTS/<kind of machine>/<suite>.json: rows, the environment, and further facts; return its path."""
    path = RESULTS / kind_of_machine(device) / f"{suite}.json"
    content = {
        "environment": environment(device),
        "copy_gb_per_s": round(copy_gb_per_s(device), 1),
        **facts,
        "rows": rows,
    }
    write_files({path: lambda temporary: write_json(temporary, content)})
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, one column per key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([str(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
