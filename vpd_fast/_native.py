"""Loads the compiled modules on first use and remembers why one is missing."""

from __future__ import annotations

import functools
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from vpd_fast.errors import InputError, MissingDependencyError

MODULES = {
    "_C": "reinstall vpd_fast from source with a C++17 compiler (pip install .)",
    "_C_cuda": "reinstall vpd_fast from source where nvcc is on PATH, with VPD_FAST_CUDA=ON",
    "_C_probes": "build it from source where nvcc is on PATH, with VPD_FAST_PROBES=ON; benchmarks/gpu.sh pack does so",
}
ISA_VARIABLE = "VPD_FAST_ISA"
_noting = threading.local()  # .calls: where `run` notes the calls of this thread


@functools.cache
def _try_load(name: str) -> ModuleType | str:
    import torch  # noqa: F401  its OpenMP runtime must be in the process first, so that there is only one

    try:
        return importlib.import_module(f"vpd_fast.{name}")
    except ImportError as error:
        return f"vpd_fast.{name} cannot be loaded ({error}); {MODULES[name]}"


def why_missing(name: str) -> str | None:
    """Why the compiled module `_C` or `_C_cuda` cannot be used, or None if it can. Loads it on first use."""
    loaded = _try_load(name)
    return loaded if isinstance(loaded, str) else None


def load(name: str) -> ModuleType:
    """The compiled module `_C` or `_C_cuda`. Raises MissingDependencyError with the reason if there is none."""
    loaded = _try_load(name)
    if isinstance(loaded, str):
        raise MissingDependencyError(loaded)
    return loaded


def run(kernel: str, *args: Any, **kwargs: Any) -> None:
    """Call a kernel of `_C`, which writes its results to addresses among the arguments."""
    native = load("_C")
    call = functools.partial(getattr(native, kernel), *args, **kwargs)
    calls = getattr(_noting, "calls", None)
    if calls is None:
        call()
        return
    if not calls or not isinstance(calls[-1], native.Calls):
        calls.append(native.Calls())  # of this and of those that follow without anything else between
    calls[-1].note(call)


@contextmanager
def noting(calls: list[Callable[[], Any]]) -> Iterator[None]:
    """Within it, what `run` calls in this thread is also appended to a list, to be called again without arguments."""
    before, _noting.calls = getattr(_noting, "calls", None), calls
    try:
        yield
    finally:
        _noting.calls = before


def is_noting() -> bool:
    """Whether what `run` calls in this thread is noted."""
    return getattr(_noting, "calls", None) is not None


def set_threads(count: int) -> None:
    """Let so many threads work for the calling one in kernels and in PyTorch; `torch.set_num_threads` would also change
    the number for threads to come."""
    import torch

    torch.get_num_threads()  # whose first call in a thread sets PyTorch's number
    load("_C").set_threads(count)


def release_threads() -> None:
    """End the threads that wait for work of the calling one; they are started again when there is some.

    While a process has more of them than processors, OpenMP lets all sleep instead of spin between two parallel
    regions, and waking them takes longer than a small operator.
    """
    load("_C").release_threads()


def isa() -> str:
    """The instruction set level of the CPU kernels: that of the environment variable VPD_FAST_ISA, else the fastest.

    Raises InputError if VPD_FAST_ISA names a level that is unknown or that this machine does not support.
    """
    return _resolve_isa(os.environ.get(ISA_VARIABLE, ""))


@functools.cache
def _resolve_isa(name: str) -> str:
    try:
        return load("_C").resolve_isa(name)
    except ValueError as error:
        raise InputError(f"environment variable {ISA_VARIABLE}: {error}") from None
