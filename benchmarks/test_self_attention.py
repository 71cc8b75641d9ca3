"""self_attention at VPD's shapes, against scaled_dot_product_attention and, where it fits, eager PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vpd_fast import ops
from vpd_fast.bench.statistics import rows_of
from vpd_fast.bench.suites import on_devices, some_of, variants_of
from vpd_fast.bench.timing import extra_memory, matmul_gflop_per_s, measure

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
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_DTYPES = ("float32", "bfloat16")
*_SHORT, _LONG = SHAPES
CASES = [*some_of(_SHORT, (MAIN, "1024x8x80")), pytest.param(_LONG, marks=pytest.mark.slow)]
MOST_PROBABILITIES = 1 << 28  # of one layer: eager PyTorch holds three tensors of this many numbers


def by_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def eager(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (by_heads(x, heads) for x in (q, k, v))
    p = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
    return (p @ v).transpose(1, 2).flatten(2)


def all_variants(case: str, dtype: torch.dtype, device: str) -> tuple[list[Tensor], dict[str, Callable[[], Tensor]]]:
    """q, k and v, slices of one projection, and the variants; for the main case the kernel of every level."""
    length, heads, dim, _ = SHAPES[case]
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, length, 3 * heads * dim, generator=generator).to(device, dtype)
    q, k, v = qkv.chunk(3, dim=-1)

    def native(impl: str) -> Tensor:
        return ops.self_attention(q, k, v, heads, impl=impl)

    def sdpa() -> Tensor:
        return scaled_dot_product_attention(*(by_heads(x, heads) for x in (q, k, v))).transpose(1, 2).flatten(2)

    variants: dict[str, Callable[[], Tensor]] = {"sdpa": sdpa}
    if heads * length**2 <= MOST_PROBABILITIES:
        variants["eager"] = lambda: eager(q, k, v, heads)
    variants |= variants_of("self_attention", device, native, all_levels=case == MAIN)
    return [q, k, v], variants


def require_parity(variants: dict[str, Callable[[], Tensor]], tensors: list[Tensor], heads: int) -> None:
    """No time is reported unless results are within twice eager's error to float64, plus one rounding of the dtype."""
    q, k, v = tensors
    rows = slice(0, 128)
    exact = eager(q[:, rows].double(), k.double(), v.double(), heads)

    def error(x: Tensor) -> float:
        return ((x[:, rows].double() - exact).norm() / exact.norm()).item()

    limit = 2 * error(eager(q[:, rows], k, v, heads)) + torch.finfo(q.dtype).eps / 2
    for name, variant in variants.items():
        found = error(variant())
        # SDPA has not promised that: its float32 on GPUs is partly TF32.
        most = 1e-2 if name == "sdpa" and q.is_cuda else limit
        assert found <= most, f"{name}: error {found:.1e}, the limit is {most:.1e}"


@functools.cache
def peak(device: str, dtype: torch.dtype) -> float:
    """GFLOP/s that this machine reaches with a matrix product."""
    return matmul_gflop_per_s(device, dtype)


@pytest.mark.parametrize(("device", "dtype"), on_devices(CPU_DTYPES, DTYPES), indirect=["device"])
@pytest.mark.parametrize("case", CASES)
def test_side_by_side(case: str, dtype: str, device: str, keep: Callable) -> None:
    length, heads, dim, layers = SHAPES[case]
    tensors, variants = all_variants(case, DTYPES[dtype], device)
    require_parity(variants, tensors, heads)
    gflop = 4 * length**2 * heads * dim / 1e9
    memory = {name: extra_memory(device, variant) for name, variant in variants.items()}
    facts = {"shape": f"1x{case}", "layers": layers, "dtype": dtype, "threads": torch.get_num_threads()}
    rows = rows_of(measure(variants, device, seconds=10), "sdpa", gflop=gflop, **facts)
    for row in rows:
        row["of_peak"] = round(row["gflop_per_s"] / peak(device, DTYPES[dtype]), 3)
        row["extra_mib"] = round(memory[row["variant"]] / 2**20, 2)
    keep(rows)
