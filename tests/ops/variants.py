"""Implementations of the operators: native kernels once per instruction set level, Triton's interpreted or on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from vpd_fast import _native
from vpd_fast.ops.availability import triton_missing

BY_KERNELS = ("triton", "cuda", "cuda_rows", "cuda_strips")  # implementations for GPUs that all tests try
ON_GPU = (*BY_KERNELS, "library")  # the last by test_products_library.py
ISAS = _native.load("_C").usable_isas()
INTERPRETED = [] if triton_missing(torch.empty(0)) else ["triton"]
if torch.cuda.is_available():  # `on_device.ops` moves what they compute
    INTERPRETED = [pytest.param(name, marks=pytest.mark.gpu) for name in BY_KERNELS]
VARIANTS = [*(f"cpu:{isa}" for isa in ISAS), *INTERPRETED, "sdpa", "reference"]


def computed_on_gpu(impl: str) -> bool:
    """Whether the implementation's results come from a GPU, not from the interpreter."""
    return impl in ON_GPU and torch.cuda.is_available()


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
