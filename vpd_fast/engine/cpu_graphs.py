"""Graphs of a fast model's stages on a CPU: the calls of kernels that a stage comes to, without Python between them.

In small models that Python takes longer than the kernels. A stage is captured by running it once while every
operation is noted (`_Capture`); a replay makes the same calls on the same memory, so its results are the same bits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from vpd_fast import _native
from vpd_fast.engine.graphs import Stage, copy_all, key_of
from vpd_fast.forks import Lock
from vpd_fast.ops import registry

MAX_GRAPHS = 24  # per model: three stages of four shapes, with all threads and with a share of them
MAX_BYTES = 64 << 20  # of a graph; what needs more memory computes so long that the Python between does not matter
# Operations that only make memory.
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class NotCapturable(Exception):
    """A stage that needs more memory than a graph is worth, or that depends on numbers it computes."""


class _Capture(TorchDispatchMode):
    """Notes the calls that repeat what runs under it, and keeps the memory they work on.

    calls: without arguments or results, in order. Operators of vpd_fast come down to PyTorch's and to kernels, which
    `_native.run` notes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []
        self._kept: list[Tensor] = []  # all memory that was allocated
        self._bytes = 0
        self._operators = registry()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "vpd_fast":
            with self:
                return self._operators[func._opname].run(*args)
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            self.calls.append(lambda: func(*args, **kwargs))
            return result
        results = _as_list(result)
        if not all(isinstance(x, Tensor) for x in results):
            raise NotCapturable(f"{func} returns no tensor")
        known = {_address(x) for x in _tensors((*args, *kwargs.values()))}
        new = [x for x in results if _address(x) not in known]  # others are views
        if new:
            self._keep(new)
            if func._opname not in _ALLOCATIONS:
                self.calls.append(lambda: copy_all(results, _as_list(func(*args, **kwargs))))
        return result

    def _keep(self, tensors: list[Tensor]) -> None:
        self._kept += tensors
        self._bytes += sum(x.untyped_storage().nbytes() for x in tensors)
        if self._bytes > MAX_BYTES:
            raise NotCapturable(f"more than {MAX_BYTES >> 20} MiB")


class CpuGraph:
    """A stage as the calls it came to, with its inputs, its outputs and all between at fixed addresses.

    outputs: of the inputs that it was captured with. Raises NotCapturable.
    """

    def __init__(self, stage: Stage, inputs: tuple[Tensor, ...]) -> None:
        with torch.inference_mode():
            self._inputs = tuple(x.clone() for x in inputs)
            self._captured = _Capture()
            with self._captured, _native.noting(self._captured.calls):
                self._outputs = stage(*self._inputs)

    def __call__(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Return the stage's results for other inputs of the same shapes, in new memory."""
        with torch.inference_mode():
            copy_all(self._inputs, inputs)
            for call in self._captured.calls:
                call()
        return self.outputs

    @property
    def outputs(self) -> list[Tensor]:
        """What the last call computed, in new memory."""
        return [x.clone() for x in self._outputs]


class CpuGraphCache:
    """Graphs by stage and shapes, the least recently used dropped, as many of each as ran at once.

    A stage is captured when its shapes come for the second time, and simply runs where that is impossible.
    """

    def __init__(self, max_graphs: int = MAX_GRAPHS, enabled: bool = True) -> None:
        self.enabled, self._max_graphs = enabled, max_graphs
        self._graphs: OrderedDict[Hashable, tuple[list[CpuGraph] | None, Any]] = OrderedDict()
        self._lock = Lock()

    def run(self, name: str, stage: Stage, *inputs: Tensor, state: Any = None) -> list[Tensor]:
        """stage(*inputs), which returns tensors that nothing else writes to.

        state: the object the stage depends on besides; it lives as long as the graph, so its id identifies it.
        """
        if not self.enabled or _observed(inputs):
            return stage(*inputs)
        key = (torch.get_num_threads(), _native.isa(), *key_of(name, state, inputs))
        with self._lock:
            is_new = key not in self._graphs
            idle, _ = self._graphs.setdefault(key, ([], state))
            self._graphs.move_to_end(key)
            while len(self._graphs) > self._max_graphs:
                self._graphs.popitem(last=False)
            graph = idle.pop() if idle else None
        if is_new or idle is None:
            return stage(*inputs)
        if graph is not None:
            results = graph(inputs)
        else:
            try:
                graph = CpuGraph(stage, inputs)
            except NotCapturable:
                with self._lock:
                    self._graphs[key] = None, state
                return stage(*inputs)
            results = graph.outputs
        with self._lock:
            idle.append(graph)
        return results


def _observed(inputs: Iterable[Tensor]) -> bool:
    """Return whether somebody wants to see or to change each operation: a tracer, autocast, another mode."""
    return (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or _get_current_dispatch_mode() is not None
        or any(type(x) is not Tensor for x in inputs)
    )


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among arguments and in lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _as_list(result: Any) -> list[Tensor]:
    return [*result] if isinstance(result, tuple | list) else [result]
