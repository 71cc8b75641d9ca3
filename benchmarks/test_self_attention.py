"""self_attention at VPD's shapes, against scaled_dot_product_attention and, where it fits, eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vpd_fast import ops
from vpd_fast.bench.attention import eager, require_parity, sdpa
from vpd_fast.bench.suites import (
    CPU_DTYPES,
    DTYPES,
    Variants,
    on_devices,
    random_tensors,
    side_by_side,
    some_of,
    variants_of,
)

# Positions, heads, head dimension, layers of that kind in the segmentation model.
SHAPES = {
    "4096x8x40": (4096, 8, 40, 5),
    "1024x8x80": (1024, 8, 80, 5),
    "256x8x160": (256, 8, 160, 5),
    "64x8x160": (64, 8, 160, 1),
    "4096x1x512": (4096, 1, 512, 1),  # of the KL encoder
    "16384x8x40": (16384, 8, 40, 5),  # of images of 1024x1024
}
MAIN = "4096x8x40"
*_SHORT, _LONG = SHAPES
CASES = [*some_of(_SHORT, (MAIN, "1024x8x80")), pytest.param(_LONG, marks=pytest.mark.slow)]
MOST_PROBABILITIES = 1 << 28  # of one layer: eager PyTorch holds three tensors of this many numbers


@on_devices("dtype", CPU_DTYPES, DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_side_by_side(case: str, dtype: str, device: str, keep: Callable) -> None:
    """q, k and v are slices of one projection; the main case has the kernel of every instruction set."""
    length, heads, dim, layers = SHAPES[case]
    qkv = random_tensors(device)(1, length, 3 * heads * dim).to(DTYPES[dtype]).chunk(3, dim=-1)
    variants: Variants = {"sdpa": lambda: sdpa(*qkv, heads)}
    if heads * length**2 <= MOST_PROBABILITIES:
        variants["eager"] = lambda: eager(*qkv, heads)[0]
    variants |= variants_of(
        "self_attention", device, lambda impl: ops.self_attention(*qkv, heads, impl=impl), all_levels=case == MAIN
    )
    # SDPA's float32 on GPUs is partly TF32.
    require_parity(variants, *qkv, heads, others=["sdpa"] if device == "cuda" else [])
    facts = {"shape": f"1x{case}", "layers": layers, "dtype": dtype, "peak_of": dtype}
    keep(side_by_side(variants, device, seconds=10, gflop=4 * length**2 * heads * dim / 1e9, **facts))
