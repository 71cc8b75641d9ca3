"""Memory of large activations, kept from call to call: touching fresh pages costs a fifth of a convolution's time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vpd_fast import _native
from vpd_fast.forks import Lock
from vpd_fast.ops.statistics import Statistics, run_length, statistics_shape


class Workspace:
    """Buffers of one call at a time. A tensor that is taken is given back when its contents are no longer needed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[Tensor] = []
        self._taken: dict[int, Tensor] = {}  # address: buffer
        self._statistics: dict[int, Statistics] = {}  # address: statistics of the tensor there
        self.finds_statistics = device.type == "cuda"  # GPU kernels compute those of their results

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor, not initialised."""
        size = math.prod(shape) * dtype.itemsize
        self._free.sort(key=Tensor.numel)
        for i, buffer in enumerate(self._free):
            if buffer.numel() >= size:
                del self._free[i]
                break
        else:
            if self._free:  # a larger buffer replaces a smaller one instead of adding to it
                del self._free[0]
            buffer = torch.empty(max(size, 1), dtype=torch.uint8, device=self._device)
        self._taken[buffer.data_ptr()] = buffer
        return buffer[:size].view(dtype).view(shape)

    def take_statistics(self, tensor: Tensor, parts: int) -> Statistics | None:
        """Memory for the statistics of a tensor (B,H,W,C) of `take` computed in equal parts; None: compute none."""
        positions = tensor.shape[1] * tensor.shape[2] // parts
        run = run_length(positions)
        if not self.finds_statistics or (parts > 1 and positions % run):
            return None
        batch, runs, *rest = statistics_shape(tensor.shape[0], positions, tensor.shape[3])
        data = torch.empty(batch, parts * runs, *rest, dtype=torch.float32, device=self._device)
        self._statistics[tensor.data_ptr()] = Statistics(data, run)
        return self._statistics[tensor.data_ptr()]

    def statistics(self, tensor: Tensor | None) -> Statistics | None:
        """The statistics of a tensor that is not given back yet, if its layer computed them."""
        return None if tensor is None else self._statistics.get(tensor.data_ptr())

    def give(self, tensor: Tensor) -> None:
        """Take back a tensor of `take`; others are left alone."""
        self._statistics.pop(tensor.data_ptr(), None)
        buffer = self._taken.pop(tensor.data_ptr(), None)
        if buffer is not None:
            self._free.append(buffer)

    def give_all(self) -> None:
        """Take back everything, as after an exception."""
        self._free += self._taken.values()
        self._taken.clear()
        self._statistics.clear()


class WorkspacePool:
    """Holds as many workspaces as calls ran at once; each call leases one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._idle: list[Workspace] = []
        self._lock = Lock()

    @contextmanager
    def lease(self) -> Iterator[Workspace]:
        """A workspace for one call, or for a graph that is being captured, whose addresses nobody else may use."""
        captured = torch.cuda.is_current_stream_capturing() if self._device.type == "cuda" else _native.is_noting()
        with self._lock:
            workspace = self._idle.pop() if self._idle and not captured else Workspace(self._device)
        try:
            yield workspace
        finally:
            workspace.give_all()
            if not captured:
                with self._lock:
                    self._idle.append(workspace)
