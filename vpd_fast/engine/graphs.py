"""CUDA graphs of a fast model's stages: one launch instead of hundreds."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from vpd_fast.forks import Lock

MAX_GRAPHS = 12  # per model: three stages of four shapes
Stage = Callable[..., "list[Tensor]"]
Graph = Callable[[tuple[Tensor, ...]], "list[Tensor]"]  # a captured stage
Tensors = tuple[Tensor, ...] | list[Tensor]


def copy_all(to: Tensors, tensors: Tensors) -> None:
    """Copy tensors to others of the same shapes, in one launch where they have the same strides and dtypes, too."""
    torch._foreach_copy_(to, tensors)  # pyright: ignore[reportPrivateImportUsage]


def key_of(name: str, state: Any, inputs: Tensors) -> tuple[Hashable, ...]:
    """What calls of a stage that may share a graph have in common."""
    return (name, id(state), *((x.shape, x.stride(), x.dtype) for x in inputs))


class CudaGraph:
    """A stage captured as a CUDA graph, with its inputs and outputs at fixed addresses."""

    def __init__(self, stage: Stage, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = tuple(x.clone() for x in inputs)
        stream = torch.cuda.Stream(inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream(inputs[0].device))
        with torch.cuda.stream(stream):
            stage(*self._inputs)  # compiles and tunes what is not yet
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._outputs = stage(*self._inputs)
            self._done = torch.cuda.Event()
            self._done.record(stream)

    def __call__(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """The stage's results for other inputs of the same shapes, in new memory."""
        stream = torch.cuda.current_stream(inputs[0].device)
        stream.wait_event(self._done)  # an earlier call may have been on another stream
        copy_all(self._inputs, inputs)
        self._graph.replay()
        results = [torch.empty_like(x) for x in self._outputs]
        copy_all(results, self._outputs)
        self._done.record(stream)
        return results


class GraphCache:
    """Graphs by stage and shapes, the least recently used dropped.

    A stage that cannot be captured (out of memory, an operation that waits for the GPU) runs without a graph from then
    on, with one warning.
    """

    def __init__(
        self,
        capture: Callable[[Stage, tuple[Tensor, ...]], Graph] = CudaGraph,
        max_graphs: int = MAX_GRAPHS,
        enabled: bool = True,
    ) -> None:
        self.enabled = enabled
        self._capture, self._max_graphs = capture, max_graphs
        self._graphs: OrderedDict[Hashable, tuple[Graph, Any]] = OrderedDict()
        self._refused: set[Hashable] = set()
        self._lock = Lock()

    def run(self, name: str, stage: Stage, *inputs: Tensor, state: Any = None) -> list[Tensor]:
        """stage(*inputs), which returns tensors that nothing else writes to.

        state: the object the stage depends on besides; it lives as long as the graph, so its id identifies it.
        """
        if not self.enabled or not self.wanted(inputs[0]):
            return stage(*inputs)
        key = key_of(name, state, inputs)
        with self._lock:
            if key in self._refused:
                return stage(*inputs)
            if key not in self._graphs:
                try:
                    self._graphs[key] = self._capture(stage, inputs), state
                except RuntimeError as error:
                    self._refused.add(key)
                    warnings.warn(
                        f"{name} runs without a CUDA graph, which could not be captured: {error}", stacklevel=3
                    )
                    return stage(*inputs)
                while len(self._graphs) > self._max_graphs:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            return self._graphs[key][0](inputs)

    @staticmethod
    def wanted(x: Tensor) -> bool:
        """Whether graphs can help where this tensor is, and no graph is being captured around the call."""
        return x.is_cuda and not torch.cuda.is_current_stream_capturing()
