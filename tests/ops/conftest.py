"""Fixtures of the operators' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .variants import ISAS, VARIANTS, choose_variant


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """torch.empty returns NaN, so that an element that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)  # in this mode uninitialised memory is filled with NaN
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(params=VARIANTS)
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an implementation; the CPU kernel once per instruction set level."""
    return choose_variant(request.param, monkeypatch)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set level of the CPU kernel."""
    choose_variant(f"cpu:{request.param}", monkeypatch)
    return request.param
