"""What Triton kernels a pass of a fast model launches on a GPU, found without one.

The engine's own code runs on tensors without memory, and each operator hands its launches over instead of making them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vpd_fast import VPDConfig, ops
from vpd_fast.bench.operations import ValuesAreFine, empty_engine
from vpd_fast.bench.variants import conditioning
from vpd_fast.config import PRECISIONS
from vpd_fast.kernels import _library

# Architectures that kernels are compiled for, and the multiprocessors of their GPUs, by which tiles are chosen: A100;
# H100 and H200; the H100 of PCIe cards.
PROCESSORS = {"sm_80": (108,), "sm_90": (132, 114)}
BATCHES = (1, 2, 4, 8, 16)
SIZES = (512, 640)
MODELS = (
    VPDConfig(),
    *(VPDConfig(task="referring", tokens=tokens) for tokens in (40, 77)),
    VPDConfig(task="depth"),
)
GEMMS = ("linear", "conv2d")  # operators for whose CUDA C++ kernels, and libraries, Triton kernels prepare rows
Record = Callable[[str, Any, tuple[int, ...], dict[str, Any]], None]  # architecture, kernel, grid, arguments


@dataclass(frozen=True)
class Configuration:
    """A model and the images that it is given."""

    config: VPDConfig
    precision: str
    batch: int
    size: int

    def __str__(self) -> str:
        return f"{self.config.task}, {self.precision}, {self.batch}x3x{self.size}x{self.size}"


def configurations(
    models: Iterable[VPDConfig] = MODELS,
    precisions: Iterable[str] = tuple(PRECISIONS),
    batches: Iterable[int] = BATCHES,
    sizes: Iterable[int] = SIZES,
) -> list[Configuration]:
    """Every combination; by default what kernels are compiled for."""
    return [Configuration(*choice) for choice in product(models, precisions, batches, sizes)]


class _Recorder(TorchDispatchMode):
    """Has every operator that is called launch its Triton kernels, too, for every architecture."""

    def __init__(self, record: Record, architectures: Iterable[str]) -> None:
        super().__init__()
        self._record, self._architectures = record, tuple(architectures)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "vpd_fast":
            operator = ops.registry()[func._schema.name.partition("::")[2]]
            arguments = operator.arguments(*args[:-1])
            for implementation in operator.implementations:
                if _launches(operator.name, implementation.name, arguments):
                    self._launch(implementation, arguments)
        return func(*args, **(kwargs or {}))

    def _launch(self, implementation: Any, arguments: Any) -> None:
        from vpd_fast.kernels.recording import recording

        for architecture in self._architectures:
            if architecture == "sm_80" and _has_float8(arguments):
                continue  # PyTorch computes those
            tiles = PROCESSORS[architecture] if implementation.name == "triton" else PROCESSORS[architecture][:1]
            for processors in tiles:
                with recording(lambda *launch, name=architecture: self._record(name, *launch), processors):
                    implementation.run(arguments)


def _launches(operator: str, implementation: str, arguments: Any) -> bool:
    """Whether an implementation launches Triton kernels; a library's sums are finished by one, too."""
    if operator in GEMMS and implementation == "library":
        return _library.refuse(arguments) is None
    return implementation == "triton" or (operator in GEMMS and implementation == "cuda")


def _has_float8(arguments: Any) -> bool:
    return getattr(getattr(arguments, "data", None), "dtype", None) == torch.float8_e4m3fn


class EmptyModel:
    """A fast model without memory, whose launches can be recorded."""

    def __init__(self, config: VPDConfig, precision: str) -> None:
        self.model = empty_engine(config, precision, "cuda")

    def record(self, batch: int, size: int, record: Record, architectures: Iterable[str] = tuple(PROCESSORS)) -> None:
        """One pass, encoder to labels, with a text that was not seen before."""
        model, task = self.model, self.model.config.task
        images = torch.empty(batch, 3, size, size, device="meta")
        recorder = _Recorder(record, architectures)
        with torch.no_grad(), ValuesAreFine(), recorder:
            context = model.context(*conditioning(model.config, batch, "meta"))
            logits = model.decode(model.features(model.encode(images), context))
            if task != "depth":
                ops.upsample_argmax(logits, images.shape[2:], align_corners=task == "referring")


def record_all(
    chosen: Iterable[Configuration], record: Record, architectures: Iterable[str] = tuple(PROCESSORS)
) -> Iterator[Configuration]:
    """Records the launches of each configuration and yields it. Those of one model should follow each other."""
    model, made = None, None
    for configuration in chosen:
        if made != (configuration.config, configuration.precision):
            made = configuration.config, configuration.precision
            model = EmptyModel(*made)
        assert model is not None
        model.record(configuration.batch, configuration.size, record, architectures)
        yield configuration
