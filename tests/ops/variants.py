"""Implementations of the operators that run on a CPU: the kernel, once per instruction set level, and the reference."""

from __future__ import annotations

import pytest

from vpd_fast import _native

ISAS = _native.load("_C").usable_isas()
VARIANTS = [*(f"cpu:{isa}" for isa in ISAS), "reference"]


def choose_variant(variant: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an implementation; sets the instruction set level that the variant says."""
    name, _, isa = variant.partition(":")
    if isa:
        monkeypatch.setenv("VPD_FAST_ISA", isa)
    return name
