"""Implementations of the operators: native kernels once per instruction set level, Triton's interpreted or on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from vpd_fast import _native
from vpd_fast.errors import InputError
from vpd_fast.ops.availability import triton_missing

ISAS = _native.load("_C").usable_isas()
INTERPRETED = [] if triton_missing(torch.empty(0)) else ["triton"]
if torch.cuda.is_available():  # `on_device.ops` moves what they compute
    INTERPRETED = [pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda")]
VARIANTS = [*(f"cpu:{isa}" for isa in ISAS), *INTERPRETED, "sdpa", "reference"]


def within_limits(impl: str, limit: str, exceeded: bool) -> contextlib.AbstractContextManager:
    """What is done in it must be refused, because of that limit of the Triton kernels, if it exceeds the limit."""
    if impl == "triton" and exceeded:
        return pytest.raises(InputError, match=limit)
    return contextlib.nullcontext()


def variants(known: Iterable[str], among: Iterable[Any] = VARIANTS) -> list[Any]:
    """Those of implementations with known names."""
    names = [(v if isinstance(v, str) else v.values[0]).partition(":")[0] for v in among]
    return [v for v, name in zip(among, names, strict=True) if name in known]


def choose_variant(variant: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an implementation; sets the instruction set level that the variant says."""
    name, _, isa = variant.partition(":")
    if isa:
        monkeypatch.setenv("VPD_FAST_ISA", isa)
    return name
