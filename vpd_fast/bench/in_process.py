"""Variants that share one process and its weights, on a CPU or a GPU; `vpd-fast bench --in-process` runs them.

On a GPU every call begins with a cold L2 cache and is timed between events, either as called, with all that the CPU has
to do, or as the replay of one CUDA graph of the whole pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vpd_fast.bench import telemetry
from vpd_fast.bench.environment import peak_memory
from vpd_fast.bench.operations import ValuesAreFine
from vpd_fast.bench.timing import L2_FLUSH_BYTES, Stopwatch, as_graph, time_limit
from vpd_fast.bench.variants import WHOLE, Case, ModelVariant, Source, Variant
from vpd_fast.bench.worker import WorkerError
from vpd_fast.models import VPD

if TYPE_CHECKING:
    from vpd_fast.engine import FastVPD


class Shared(Source):
    """A source of models with the same parameters in the same memory, on the device of the model that it is given.

    timed: "replays" if passes are timed as replays of CUDA graphs, otherwise they are called. Variants and fast models
    are made once. compile_seconds: the most that torch.compile may take for a variant and a case.
    """

    def __init__(self, model: VPD, scratch: Path, threads: int, compile_seconds: float | None = None) -> None:
        super().__init__(scratch, scratch, threads)
        self.compile_seconds = compile_seconds
        self.model, self.device, self.timed = model, model.device.type, "calls"
        self.telemetry = telemetry.Telemetry(self.device)
        cold = self.device == "cuda"
        self.flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=self.device) if cold else None
        self._fast: dict[str, FastVPD] = {}
        self._variants: dict[str, Variant] = {}

    def load(self) -> VPD:
        """Return another model of these parameters."""
        model = VPD.empty(self.model.config)
        model.load_state_dict(self.model.state_dict(), assign=True)
        return model.eval()

    def optimize(self, precision: str) -> FastVPD:
        """Return the fast model, the same one for all variants."""
        if precision not in self._fast:
            self._fast[precision] = super().optimize(precision)
        return self._fast[precision]

    def variant(self, name: str, make: Callable[[Source], Variant]) -> Variant:
        """Return the variant of that name, made by the first call."""
        if name not in self._variants:
            self._variants[name] = make(self)
        return self._variants[name]


class Turn:
    """One variant in this process, with the methods of a `Worker`; whatever fails raises WorkerError."""

    def __init__(self, make: Callable[[Source], Variant], source: Shared, name: str) -> None:
        self._make, self._source, self._name = make, source, name
        self._variant: Variant
        self._replay: Callable[[], Any] | None = None

    def wait(self) -> dict[str, int]:
        """Make the variant; its memory is not known apart from the others'."""
        with _failures():
            self._variant = self._source.variant(self._name, self._make)
        return {"resident": 0, "peak": 0}

    def prepare(self, case: Case, outputs: Path) -> dict[str, int]:
        """One pass for the case, whose results are saved as `outputs`.

        {"peak"}: most bytes during it, of the process on a CPU, and of the variant with its weights on a GPU.
        """
        with _failures(), self._limited():
            self._variant.prepare(case)
            device = self._source.device
            result, before, peak = peak_memory(device, lambda: self._variant.run()[1])
            result.save(outputs)
            if device == "cuda":
                peak += (nbytes(self._variant.model) if isinstance(self._variant, ModelVariant) else 0) - before
            if self._source.timed == "replays":
                with torch.inference_mode(), ValuesAreFine():
                    self._replay = as_graph(self._variant.run)
            for _ in range(3 if device == "cuda" else 0):  # warm up
                self.run()
        return {"resident": 0, "peak": peak}

    def run(self) -> dict[str, float]:
        """One pass of the case that was prepared last: seconds of each stage, or of the whole."""
        with _failures():
            if self._source.flush is not None:
                self._source.flush.zero_()
            if self._replay is None:
                seconds = self._variant.run()[0]
            else:
                watch = Stopwatch(self._source.device)
                self._replay()
                watch.lap(WHOLE)
                seconds = watch.seconds
        self._source.telemetry(f"{self._source.timed} {self._name}")
        return seconds

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """End torch.compile when its time is over. Raises TimeoutError."""
        if not isinstance(self._variant, ModelVariant) or self._variant.mode is None:
            yield
            return
        try:
            with time_limit(self._source.compile_seconds, "compiling and the first passes"):
                yield
        except TimeoutError:
            torch.compiler.reset()  # half of a graph is of no use
            raise

    def close(self) -> None:
        """Forget the graph; the variant is kept by the source."""
        self._replay = None


def nbytes(model: Any) -> int:
    """Memory of a model's parameters and buffers, and of its layers if it is fast, in bytes."""
    tensors = sum(tensor.nbytes for tensor in model.state_dict().values())
    return tensors + (model.report().bytes if hasattr(model, "report") else 0)


@contextmanager
def _failures() -> Iterator[None]:
    """Turn whatever a library raises, such as out of memory, into a WorkerError of one line."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise WorkerError(f"{type(error).__name__}: {lines[0]}") from error
