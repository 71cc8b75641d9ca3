"""Whole forward passes, with labels, of `vpd_fast.optimize` in every precision, against the plain model.

`vpd-fast bench` does the same with a process for each variant, and with other libraries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

import vpd_fast
from vpd_fast import VPD, BackboneConfig, VPDConfig
from vpd_fast.bench.parity import agreement, passes
from vpd_fast.bench.suites import on_devices, side_by_side
from vpd_fast.bench.variants import Case, ModelVariant, plain_labels
from vpd_fast.engine.policy import PRECISIONS
from vpd_fast.errors import InputError
from vpd_fast.models.random_weights import randomize
from vpd_fast.ops import upsample_argmax

CPU_PRECISIONS = ("fp32", "bf16", "int8")
SMALL = BackboneConfig(model_channels=64, context_dim=128, num_heads=4, vae_ch=64)
CASES = {
    "a fifth as wide, 256x256": (VPDConfig(num_classes=20, channels=64, base_size=256, backbone=SMALL), Case(256)),
    "full size, 512x512": (VPDConfig(), Case(512)),
}


@functools.lru_cache(maxsize=1)
def plain_model(case: str, device: str) -> VPD:
    """The same random weights every time."""
    return randomize(VPD.empty(CASES[case][0]), seed=0).eval().to(device)


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.slow] if "full" in name else []) for name in CASES]
)
@on_devices("precision", CPU_PRECISIONS, PRECISIONS)
def test_side_by_side(case: str, precision: str, device: str, keep: Callable) -> None:
    """The plain and the fast model, on a GPU as called: fast models bring their own CUDA graphs."""
    model = plain_model(case, device)
    try:
        fast = vpd_fast.optimize(model, precision)
    except InputError as error:
        pytest.skip(str(error))
    variants = {"plain": ModelVariant(model, plain_labels), precision: ModelVariant(fast, upsample_argmax)}
    outputs = {}
    for name, variant in variants.items():
        variant.prepare(CASES[case][1])
        outputs[name] = variant.run()[1]
    found = agreement(outputs[precision], outputs["plain"])
    assert passes(found, precision), f"{precision} does not agree with the plain model: {found}"
    calls = {name: variant.run for name, variant in variants.items()}
    rows = side_by_side(calls, device, rounds=10, seconds=60, graphs=False, case=case)
    keep([row for row in rows if row["variant"] == precision or precision == CPU_PRECISIONS[0]])
