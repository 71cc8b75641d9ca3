"""Memory of large activations, kept from call to call: touching fresh pages costs a fifth of a convolution's time."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Workspace:
    """Buffers of one call at a time. Who takes a tensor gives it back when nobody needs its contents any more."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[Tensor] = []
        self._taken: dict[int, Tensor] = {}  # address: buffer

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

    def give(self, tensor: Tensor) -> None:
        """Take back a tensor of `take`; others are left alone."""
        buffer = self._taken.pop(tensor.data_ptr(), None)
        if buffer is not None:
            self._free.append(buffer)

    def give_all(self) -> None:
        """Take back everything, as after an exception."""
        self._free += self._taken.values()
        self._taken.clear()


class WorkspacePool:
    """As many workspaces as calls run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._idle: list[Workspace] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return WorkspacePool, (self._device,)  # a copy has memory of its own

    @contextmanager
    def lease(self) -> Iterator[Workspace]:
        """A workspace for one call, or for a CUDA graph that is being captured, whose addresses nobody else may use."""
        captured = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        with self._lock:
            workspace = self._idle.pop() if self._idle and not captured else Workspace(self._device)
        try:
            yield workspace
        finally:
            workspace.give_all()
            if not captured:
                with self._lock:
                    self._idle.append(workspace)
