"""What the steps share in the process that measures: device, models, clocks, and how a time is taken."""

from __future__ import annotations

import functools
import gc
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

MAX_RESERVED = 0.4  # of the GPU's memory, before unused memory is looked for
STAND_IN = "stand_in"  # key of rows whose GPU part was replaced in a dry run, and by what


class Setting:
    """A GPU, or with {"dry": True} the CPU, tiny sizes and interpreted Triton kernels.

    Raises SystemExit without a GPU.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.dry = bool(options["dry"])
        if self.dry:
            os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
        import torch

        from vpd_fast.bench.telemetry import Sampler

        if not self.dry and not torch.cuda.is_available():
            raise RuntimeError("PyTorch finds no NVIDIA GPU here")
        self.device = "cpu" if self.dry else "cuda"
        self._sampler = Sampler(self.device)
        self._generator = torch.Generator(self.device).manual_seed(0)

    def facts(self) -> dict[str, Any]:
        """What results depend on."""
        from vpd_fast.bench import telemetry
        from vpd_fast.bench.environment import environment

        return {"dry": self.dry, **environment(self.device), **telemetry.facts()}

    def conditions(self, start: float) -> dict[str, float]:
        """Medians of the clocks, the power and the temperature since that time of `time.monotonic`."""
        return self._sampler.medians(start)

    def tidy(self) -> None:
        """Give a GPU's memory back that steps used, when much of it is taken: to look for it takes a while."""
        import torch

        if self.device == "cuda" and torch.cuda.memory_reserved() > MAX_RESERVED * torch.cuda.mem_get_info()[1]:
            gc.collect()
            torch.cuda.empty_cache()

    @property
    def model_name(self) -> str:
        """Key of `vpd_fast.bench.engine_pass.MODELS`."""
        return "small" if self.dry else "full"

    @property
    def size(self) -> int:
        """Height and width of images in pixels."""
        return 64 if self.dry else 512

    def only(self, all_values: list[Any], first: int = 1) -> list[Any]:
        """All values, or in a dry run the first of them."""
        return all_values[:first] if self.dry else all_values

    @functools.cached_property
    def plain(self) -> Any:
        """The plain model with random weights on the device."""
        from vpd_fast import VPD
        from vpd_fast.bench.engine_pass import MODELS
        from vpd_fast.models.random_weights import randomize

        return randomize(VPD.empty(MODELS[self.model_name]), seed=0, device=self.device).eval()

    def random(self, *shape: int, dtype: Any = None) -> Any:
        """Normal random numbers on the device, int8 and float8 over most of their range."""
        import torch

        if dtype == torch.int8:
            return torch.randint(-127, 128, shape, generator=self._generator, device=self.device, dtype=torch.int8)
        x = torch.randn(shape, generator=self._generator, device=self.device)
        return x.to(dtype or torch.float32)

    def milliseconds(
        self, variants: dict[str, Callable[[], Any]], *, rounds: int = 20, seconds: float = 2.0, cold: bool = True
    ) -> dict[str, float]:
        """The median time of each variant in ms, as replays of a CUDA graph that take turns.

        cold: with an empty L2 cache.
        """
        import torch

        from vpd_fast.bench.statistics import percentile
        from vpd_fast.bench.timing import measure

        with torch.inference_mode():
            if self.dry:
                return {name: 1e3 * _seconds(call) for name, call in variants.items()}
            times = measure(variants, self.device, rounds=rounds, seconds=seconds, cold=cold)
        return {name: 1e3 * percentile(values, 50) for name, values in times.items()}

    def possible(self, variants: dict[str, Callable[[], Any]]) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
        """Variants that can be called, and of the others why not."""
        from measuring.worker import is_fatal

        usable, reasons = {}, {}
        for name, call in variants.items():
            try:
                call()
                usable[name] = call
            except (RuntimeError, NotImplementedError, ValueError) as error:
                if is_fatal(error):
                    raise
                reasons[name] = str(error).strip().splitlines()[0][:200]
        return usable, reasons

    def capturing(self) -> AbstractContextManager:
        """Within it checks of values pass, as nobody may ask for those while a CUDA graph is captured."""
        from vpd_fast.bench.operations import ValuesAreFine

        return nullcontext() if self.dry else ValuesAreFine()


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
