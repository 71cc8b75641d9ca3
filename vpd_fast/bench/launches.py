"""What Triton kernels a pass of a fast model launches on a GPU, found without one.

The engine's own code runs on tensors without memory, and each operator hands its launches over instead of making them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vpd_fast import VPDConfig, ops
from vpd_fast.bench.operations import ValuesAreFine, empty_engine
from vpd_fast.bench.variants import conditioning
from vpd_fast.config import PRECISIONS
from vpd_fast.engine import Policy
from vpd_fast.kernels import _library
from vpd_fast.kernels.tables import Gpu

# Architectures that kernels are compiled for, GPUs that run them, and how many multiprocessors those have, by which
# tiles are chosen.
GPUS = {
    "sm_80": {
        Gpu("NVIDIA A100-SXM4-80GB", (8, 0)): 108,
        Gpu("NVIDIA A10", (8, 6)): 72,
        Gpu("NVIDIA GeForce RTX 3090", (8, 6)): 82,
        Gpu("NVIDIA L4", (8, 9)): 58,
        Gpu("NVIDIA GeForce RTX 4090", (8, 9)): 128,
        Gpu("NVIDIA L40S", (8, 9)): 142,
    },
    # And the other H100s, as the H200.
    "sm_90": {Gpu("NVIDIA H200", (9, 0)): 132, Gpu("NVIDIA H100 PCIe", (9, 0)): 114},
}
BATCHES = (1, 2, 4, 8, 16)
SIZES = (512, 640)
MODELS = (
    VPDConfig(),
    *(VPDConfig(task="referring", tokens=tokens) for tokens in (40, 77)),
    VPDConfig(task="depth"),
)
GEMMS = ("linear", "conv2d")  # operators of which Triton kernels do a part, whatever multiplies
Record = Callable[[str, Any, tuple[int, ...], dict[str, Any]], None]  # architecture, kernel, grid, arguments


@dataclass(frozen=True)
class Configuration:
    """A model and the images that it is given. static_rows: whether its policy has them."""

    config: VPDConfig
    precision: str
    batch: int
    size: int
    static_rows: bool = False

    @property
    def engine(self) -> tuple[VPDConfig, str, Policy]:
        """Arguments of `EmptyModel`."""
        return self.config, self.precision, Policy(static_rows=self.static_rows)

    def __str__(self) -> str:
        precision = f"{self.precision} with static rows" if self.static_rows else self.precision
        return f"{self.config.task}, {precision}, {self.batch}x3x{self.size}x{self.size}"


def configurations(
    models: Iterable[VPDConfig] = MODELS,
    precisions: Iterable[str] = tuple(PRECISIONS),
    batches: Iterable[int] = BATCHES,
    sizes: Iterable[int] = SIZES,
) -> list[Configuration]:
    """Every combination, int8 also with static rows; by default what kernels are compiled for."""
    images = list(product(batches, sizes))
    return [
        Configuration(config, precision, *image, static_rows)
        for config, precision in product(models, precisions)
        for static_rows in ((False, True) if precision == "int8" else (False,))
        for image in images
    ]


class _Recorder(TorchDispatchMode):
    """Has every operator that is called launch its Triton kernels, too, for every architecture."""

    def __init__(self, record: Record, architectures: Iterable[str], seen: set[Hashable] | None) -> None:
        """seen: calls that need not be recorded again, to which those that are will be added; None: all are."""
        super().__init__()
        self._record, self._architectures, self._seen = record, tuple(architectures), seen

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "vpd_fast":
            call = func, *map(_description, args)
            if self._seen is None or call not in self._seen:
                self._launch(func, args)
            if self._seen is not None:
                self._seen.add(call)
        return func(*args, **(kwargs or {}))

    def _launch(self, func: Any, args: tuple) -> None:
        from vpd_fast.kernels import tables
        from vpd_fast.kernels.recording import recording

        operator = ops.registry()[func._schema.name.partition("::")[2]]
        arguments = operator.arguments(*args[:-1])
        runs = [i.run for i in operator.implementations if _launches(operator.name, i.name, arguments)]
        for architecture in self._architectures:
            if architecture == "sm_80" and _has_float8(arguments):
                continue  # PyTorch computes those, and Triton compiles them for sm_89
            for gpu, processors in GPUS[architecture].items():
                table = tables.of_gpu(gpu).table
                configs = {} if table is None else table.configs
                with recording(lambda *launch, of=architecture: self._record(of, *launch), processors, configs):
                    for run in runs:
                        run(arguments)


def _launches(operator: str, implementation: str, arguments: Any) -> bool:
    """Whether an implementation launches Triton kernels; a library's sums are finished by one, too."""
    if operator in GEMMS and implementation == "library":
        return _library.refuse(arguments) is None
    return implementation == "triton" or (operator in GEMMS and implementation == "cuda")


def _has_float8(arguments: Any) -> bool:
    return getattr(getattr(arguments, "data", None), "dtype", None) == torch.float8_e4m3fn


def _description(value: Any) -> Hashable:
    """What a launch depends on of an operator's argument."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.storage_offset() * value.itemsize % 16
    return tuple(value) if isinstance(value, list) else value


class EmptyModel:
    """A fast model without memory, whose launches can be recorded."""

    def __init__(self, config: VPDConfig, precision: str, policy: Policy | None = None) -> None:
        self.model = empty_engine(config, precision, "cuda", policy)

    def record(
        self, batch: int, size: int, record: Record, architectures: Iterable[str] = tuple(GPUS),
        seen: set[Hashable] | None = None,
    ) -> None:  # fmt: skip
        """One pass, encoder to labels, with a text that was not seen before. seen: calls that are left out."""
        model, task = self.model, self.model.config.task
        images = torch.empty(batch, 3, size, size, device="meta")
        with torch.no_grad(), ValuesAreFine(), _Recorder(record, architectures, seen):
            context = model.context(*conditioning(model.config, batch, "meta"))
            logits = model.decode(model.features(model.encode(images), context))
            if task != "depth":
                ops.upsample_argmax(logits, images.shape[2:], align_corners=task == "referring")


def record_all(
    chosen: Iterable[Configuration], record: Record, architectures: Iterable[str] = tuple(GPUS)
) -> Iterator[Configuration]:
    """Records the launches of each configuration and yields it; those of equal calls of operators only once.

    Those of one model should follow each other.
    """
    model, made, seen = None, None, set()
    for configuration in chosen:
        if model is None or made != configuration.engine:
            made = configuration.engine
            model = EmptyModel(*made)
        model.record(configuration.batch, configuration.size, record, architectures, seen)
        yield configuration
