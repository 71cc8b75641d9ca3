"""Addresses that interpreted Triton kernels read and write, checked as a sanitizer does it on a GPU, and closer."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch


def check_addresses() -> None:
    """From now on a kernel that reads or writes beyond the first and the last element of its arguments is an error."""
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    if hasattr(interpreter.InterpreterBuilder.create_masked_load, "__wrapped__"):
        return
    memory: list[tuple[int, int]] = []  # of the arguments of a launch: begin and end
    launch = interpreter.GridExecutor.__call__

    @functools.wraps(launch)
    def launch_with_known_memory(self: Any, *arguments: Any, **options: Any) -> None:
        memory[:] = _extents((*arguments, *options.values()))
        launch(self, *arguments, **options)

    def checked(access: Callable) -> Callable:
        @functools.wraps(access)
        def access_within_memory(self: Any, pointers: Any, *others: Any) -> Any:
            mask = next(x.data for x in others if x is not None and x.data.dtype == bool)
            addresses = pointers.data[mask] if not mask.all() else pointers.data
            if addresses.size:
                low, high = int(addresses.min()), int(addresses.max())
                high += pointers.get_element_ty().primitive_bitwidth // 8
                if not any(begin <= low and high <= end for begin, end in memory):
                    raise IndexError(f"addresses {low} to {high} are not within one argument: {sorted(memory)}")
            return access(self, pointers, *others)

        return access_within_memory

    interpreter.GridExecutor.__call__ = launch_with_known_memory
    for name in ("create_masked_load", "create_masked_store"):
        setattr(interpreter.InterpreterBuilder, name, checked(getattr(interpreter.InterpreterBuilder, name)))


def _extents(values: Iterable[Any]) -> list[tuple[int, int]]:
    """Memory of tensors, from the first to the last element."""
    tensors = [x for x in values if isinstance(x, torch.Tensor) and x.numel()]
    spans = [1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) for x in tensors]
    return [(x.data_ptr(), x.data_ptr() + n * x.element_size()) for x, n in zip(tensors, spans, strict=True)]
