"""Fixtures of the operators' tests."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import pytest
import torch

from vpd_fast.ops._dispatch import registry
from vpd_fast.ops.availability import triton_missing

from .variants import ISAS, choose_variant, variants

if triton_missing(torch.empty(0)) is None:
    # Kernels are interpreted or compiled as decided when they are defined: now, not under a test's environment.
    kernels = importlib.import_module("vpd_fast.kernels")
    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"vpd_fast.kernels.{module.name}")


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    """Operators share their work between threads, whatever number of processors the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """torch.empty returns NaN, so that an element that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)  # in this mode uninitialised memory is filled with NaN
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`impl` is every implementation of the operator after which the file is called, or of its IMPLEMENTATIONS."""
    if "impl" in metafunc.fixturenames:
        file = metafunc.module.__name__.rpartition(".test_")[2]
        op = max((op for op in registry().values() if file.startswith(op.name)), key=lambda op: len(op.name))
        known = getattr(metafunc.module, "IMPLEMENTATIONS", {i.name for i in op.implementations})
        metafunc.parametrize("impl", variants(known), indirect=True)


@pytest.fixture
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an implementation; the CPU kernel once per instruction set level."""
    return choose_variant(request.param, monkeypatch)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set level of the CPU kernel."""
    choose_variant(f"cpu:{request.param}", monkeypatch)
    return request.param
