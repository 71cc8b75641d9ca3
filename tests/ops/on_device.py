"""The operators, with what is computed on a GPU moved there and back, so that one set of tests serves both devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vpd_fast import ops as _ops
from vpd_fast.ops._dispatch import registry
from vpd_fast.ops.packing import PackedWeight
from vpd_fast.ops.statistics import Statistics

from .variants import ON_GPU


class Moved:
    """Arguments on another device: copies of all memory between their first and last element, with the same strides."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._copies: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # by id: the tensor, its copy, the copied memory

    def there(self, value: Any) -> Any:
        """The argument there; one tensor is one copy, however often it comes."""
        if isinstance(value, Tensor):
            if id(value) not in self._copies:
                memory = self._memory(value).to(self._device, copy=True)
                self._copies[id(value)] = value, memory.as_strided(value.shape, value.stride(), 0), memory
            return self._copies[id(value)][1]
        if isinstance(value, PackedWeight):
            return value.for_device(self._device)
        if isinstance(value, Statistics):
            return replace(value, data=self.there(value.data))
        return value

    def back(self, result: Any) -> Any:
        """What was written to arguments, and the result; one that is an argument is that argument again."""
        for value, _, memory in self._copies.values():
            self._memory(value).copy_(memory)
        if isinstance(result, tuple):
            return tuple(self.back(part) for part in result)
        known = [value for value, copy, _ in self._copies.values() if copy is result]
        return known[0] if known else result.cpu()

    @staticmethod
    def _memory(value: Tensor) -> Tensor:
        span = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
        return value.as_strided((span,), (1,))


def moved(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """The function computed there, on arguments that are here."""

    def call(*args: Any, **kwargs: Any) -> Any:
        memory = Moved(device)
        there = {name: memory.there(value) for name, value in kwargs.items()}
        return memory.back(function(*(memory.there(value) for value in args), **there))

    return call


class _Ops:
    """`vpd_fast.ops`; implementations for GPUs are computed on one if there is one."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(_ops, name)
        if name not in registry() or not torch.cuda.is_available():
            return function
        there = moved(function, "cuda")

        def call(*args: Any, impl: str = "auto", **kwargs: Any) -> Any:
            here = not any(isinstance(value, Tensor) and value.is_cuda for value in (*args, *kwargs.values()))
            return (there if here and impl in ON_GPU else function)(*args, impl=impl, **kwargs)

        return call


ops = _Ops()
