"""cross_attention_maps at VPD's shapes, against eager PyTorch, SDPA without maps, SDPA with a second pass for the maps,
and torch.compile of the eager form.

The large cases (1024x1024 images, batch 8) are marked slow. Cases whose probabilities would not fit are skipped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vpd_fast import ops
from vpd_fast.bench.statistics import percentile, rows_of
from vpd_fast.bench.suites import EXHAUSTIVE, on_devices, variants_of
from vpd_fast.bench.timing import copy_gb_per_s, extra_memory, matmul_gflop_per_s, measure

HEADS = 8
# Image side -> (queries, head dimension, layers) of the UNet's 16 cross-attentions.
SHAPES = {
    512: ((4096, 40, 5), (1024, 80, 5), (256, 160, 5), (64, 160, 1)),
    1024: ((16384, 40, 5), (4096, 80, 5), (1024, 160, 5), (256, 160, 1)),
}
TOKENS = (1, 40, 77, 150, 847)
MAIN = (512, 0, 150, 1)  # image side, index in SHAPES, tokens, batch
TYPICAL = (MAIN, (512, 1, 40, 1))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOST_PROBABILITIES = 1 << 29  # of one layer: eager PyTorch holds three tensors of this many numbers
PEERS = ("eager", "sdpa without maps", "sdpa and maps", "compiled eager")
Variants = dict[str, Callable[[], tuple[Tensor, ...]]]


def by_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def eager(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = by_heads(q), by_heads(k), by_heads(v)
    p = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
    return (p @ v).transpose(1, 2).flatten(2), p.float().mean(1)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    return (scaled_dot_product_attention(by_heads(q), by_heads(k), by_heads(v)).transpose(1, 2).flatten(2),)


def sdpa_and_maps(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = by_heads(q) @ by_heads(k).transpose(-2, -1) * (q.shape[-1] // HEADS) ** -0.5
    return *sdpa(q, k, v), torch.softmax(scores, dim=-1).float().mean(1)


def inputs(shape: tuple[int, int, int], tokens: int, batch: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q and, for a context that all images share, k and v."""
    queries, dim, _ = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((batch, queries), (1, tokens), (1, tokens))
    return [torch.randn(*size, HEADS * dim, generator=generator).to(dtype).to(device) for size in sizes]


def forward_variants(tensors: list[Tensor], device: str, main: bool) -> Variants:
    q, k, v = tensors
    wide = [x.expand(q.shape[0], -1, -1) for x in (k, v)]  # the others know no shared context
    variants: Variants = {
        "eager": lambda: eager(q, k, v),
        "sdpa without maps": lambda: sdpa(q, *wide),
        "sdpa and maps": lambda: sdpa_and_maps(q, *wide),
    }
    if main:
        compiled = torch.compile(eager, fullgraph=True, dynamic=False)
        variants["compiled eager"] = lambda: compiled(q, k, v)
    return variants | variants_of(
        "cross_attention_maps", device, lambda impl: ops.cross_attention_maps(q, k, v, HEADS, impl=impl), main
    )


def require_parity(variants: Variants, tensors: list[Tensor]) -> None:
    """No time is reported unless results are within twice eager's error to float64, plus one rounding of the dtype."""
    q, k, v = tensors
    rows = slice(0, 256)
    exact = eager(q[:1, rows].double(), k.double(), v.double())

    def errors(results: tuple[Tensor, ...]) -> list[float]:
        return [((x[:1, rows].double() - e).norm() / e.norm()).item() for x, e in zip(results, exact, strict=False)]

    eagerly = errors(eager(q[:1, rows], k, v))
    units = torch.finfo(q.dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    for name, variant in variants.items():
        for error, base, unit in zip(errors(variant()), eagerly, units, strict=False):
            # Nobody else has promised that budget: SDPA's float32 on GPUs is partly TF32.
            limit = 2 * base + unit if name not in PEERS else 1e-2
            assert error <= limit, f"{name}: error {error:.1e}, eager's is {base:.1e}"


def gradient_limit(dtype: torch.dtype) -> float:
    """Between two gradients. float32: sums over 4096 queries err by about 64 roundings of 2^-24 in either, so 1e-5.

    16 bits: two times five products are rounded to 2^-9, so 2e-2.
    """
    return 1e-5 if dtype == torch.float32 else 2e-2


@functools.cache
def peaks(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """(GB/s, GFLOP/s) that this machine reaches with a copy and a matrix product."""
    return copy_gb_per_s(device), matmul_gflop_per_s(device, dtype)


def add_rows(
    keep: Callable,
    variants: Variants,
    device: str,
    tensors: list[Tensor],
    seconds: float,
    passes: float,
    graphs: bool = True,
    **facts: Any,
) -> None:
    """Measures and keeps one row per variant. passes: the work in forwards (two products); 3.5 with the backward."""
    q, k, v = tensors
    batch, queries, width = q.shape
    maps = batch * queries * k.shape[1]
    gigabytes = ((2 * q.numel() + k.numel() + v.numel()) * q.element_size() + 4 * maps) / 1e9 * passes
    gflop = 4 * maps * width / 1e9 * passes
    rates = peaks(device, q.dtype)
    floor_ms = 1e3 * max(gigabytes / rates[0], gflop / rates[1])
    memory = {name: extra_memory(device, variant) for name, variant in variants.items()}
    rows = rows_of(measure(variants, device, seconds=seconds, graphs=graphs), "eager", gigabytes, gflop, **facts)
    sdpa_ms = next(row["p50_ms"] for row in rows if row["variant"].startswith("sdpa"))
    for row in rows:
        row["of_peak"] = round(floor_ms / row["p50_ms"], 3)
        row["over_sdpa"] = round(sdpa_ms / row["p50_ms"], 2)
        row["extra_mib"] = round(memory[row["variant"]] / 2**20, 2)
    keep(rows)


def all_cases() -> list:
    cases = []
    for side, shapes in SHAPES.items():
        for index, (queries, dim, _) in enumerate(shapes):
            for tokens in TOKENS:
                for batch in (1, 8):
                    marks = [pytest.mark.slow] if side > 512 or batch > 1 else []
                    marks += [EXHAUSTIVE] if (side, index, tokens, batch) not in TYPICAL else []
                    name = f"{batch}x{queries}x{HEADS}x{dim} to {tokens}"
                    cases.append(pytest.param((side, index, tokens, batch), marks=marks, id=name))
    return cases


@pytest.mark.parametrize(("device", "dtype"), on_devices(DTYPES, DTYPES), indirect=["device"])
@pytest.mark.parametrize("case", all_cases())
def test_forward(case: tuple[int, int, int, int], dtype: str, device: str, keep: Callable) -> None:
    side, index, tokens, batch = case
    queries, dim, layers = SHAPES[side][index]
    if batch * HEADS * queries * tokens > MOST_PROBABILITIES:
        pytest.skip(
            "eager PyTorch would hold more than 6 GB of probabilities; the tests have the operator alone at such sizes"
        )
    tensors = inputs(SHAPES[side][index], tokens, batch, DTYPES[dtype], device)
    variants = forward_variants(tensors, device, case == MAIN)
    if tokens == 1:  # a constant: no kernel
        variants = {name: f for name, f in variants.items() if name.partition(" ")[0] in ("eager", "sdpa")}
        variants["constant"] = lambda: ops.cross_attention_maps(*tensors, HEADS)
    require_parity(variants, tensors)
    facts = {"image": side, "shape": f"{batch}x{queries}x{HEADS}x{dim}", "tokens": tokens, "layers": layers}
    facts |= {"dtype": dtype, "threads": torch.get_num_threads()}
    add_rows(keep, variants, device, tensors, 2.0 if case != MAIN else 10.0, 1, **facts)


@pytest.mark.parametrize("tokens", [pytest.param(40, marks=EXHAUSTIVE), 150])
def test_training_step(tokens: int, device: str, keep: Callable) -> None:
    """Forward and backward, maps detached: autograd through eager PyTorch, through SDPA, through the operator."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tensors = [x.requires_grad_() for x in inputs(SHAPES[512][0], tokens, 1, dtype, device)]
    grad = torch.randn(tensors[0].shape).to(tensors[0])

    def gradients(forward: Callable) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(forward(*tensors)[0], tensors, grad)

        return run

    variants = {
        "eager": gradients(eager),
        "sdpa without maps": gradients(sdpa),
        "operator": gradients(lambda q, k, v: ops.cross_attention_maps(q, k, v, HEADS)),
    }
    expected = variants["eager"]()
    for name, variant in variants.items():
        for a, b in zip(variant(), expected, strict=True):
            error = ((a - b).norm() / b.norm()).item()
            assert error <= gradient_limit(dtype), f"{name}: {error:.1e}"
    facts = {"image": 512, "shape": "training step", "tokens": tokens, "dtype": str(dtype).removeprefix("torch.")}
    add_rows(keep, variants, device, tensors, 5.0, 3.5, **facts, threads=torch.get_num_threads())


def test_backward_alone(device: str, keep: Callable) -> None:
    """With gradients of the maps: the operator's backward against autograd through eager PyTorch."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tensors = [x.requires_grad_() for x in inputs(SHAPES[512][1], 150, 1, dtype, device)]
    q, k, v = (x.detach() for x in tensors)
    grad_out, grad_maps = torch.randn(q.shape).to(q), torch.randn(1, q.shape[1], 150).to(device)
    results, (without_maps,) = eager(*tensors), sdpa(*tensors)
    grads = grad_out, grad_maps
    variants = {
        "eager": lambda: torch.autograd.grad(results, tensors, grads, retain_graph=True),
        "sdpa without maps": lambda: torch.autograd.grad(without_maps, tensors, grad_out, retain_graph=True),
        "operator": lambda: ops.cross_attention_maps_backward(*grads, q, k, v, HEADS),
    }
    for a, b in zip(variants["operator"](), variants["eager"](), strict=True):
        error = ((a - b).norm() / b.norm()).item()
        assert error <= gradient_limit(dtype), f"{error:.1e}"
    facts = {"image": 512, "shape": "backward with maps, 1x1024x8x80", "tokens": 150}
    facts |= {"dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    # Autograd runs a backward on the stream of its forward, which is not the one of a capture.
    add_rows(keep, variants, device, [q, k, v], 5.0, 2.5, graphs=False, **facts)


def test_mean_of_five_layers_into_features(device: str, keep: Callable) -> None:
    """The 32x32 level: five layers, the mean of their maps behind 640 channels of a features tensor."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    layers = [inputs(SHAPES[512][1], 150, 1, dtype, device) for _ in range(5)]
    features = torch.randn(1, 640, 32, 32).to(device, dtype)
    whole = torch.empty(1, 790, 32, 32, device=device, dtype=dtype)
    sums = torch.empty(1, 1024, 150, device=device)

    def eagerly() -> tuple[Tensor]:
        maps = sum(eager(*layer)[1] for layer in layers) / 5
        return (torch.cat([features, maps.transpose(1, 2).unflatten(2, (32, 32)).to(dtype)], dim=1),)

    def on_the_fly() -> tuple[Tensor]:
        for i, layer in enumerate(layers[:-1]):
            ops.cross_attention_maps_into(*layer, sums, HEADS, weight=0.2, accumulate=i > 0)
        whole[:, :640] = features
        ops.cross_attention_maps_into(*layers[-1], whole[:, 640:], HEADS, weight=0.2, addend=sums)
        return (whole,)

    (expected,), (actual,) = eagerly(), on_the_fly()
    assert ((actual - expected).norm() / expected.norm()).item() <= torch.finfo(dtype).eps
    times = measure({"eager": eagerly, "operator": on_the_fly}, device, seconds=3)
    facts = {"image": 512, "shape": "five layers into features", "tokens": 150}
    keep(rows_of(times, "eager", **facts, dtype=str(dtype).removeprefix("torch."), threads=torch.get_num_threads()))


@EXHAUSTIVE
def test_linear_in_queries(device: str, keep: Callable) -> None:
    """Time per query should not depend on their number: rows for 4096, 16384 and 65536 queries."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    variants = {}
    for queries in (4096, 16384, 65536):
        tensors = inputs((queries, 40, 1), 150, 1, dtype, device)
        variants[f"{queries} queries"] = lambda t=tensors: ops.cross_attention_maps(*t, HEADS)
    times = measure(variants, device, seconds=5)
    rows = rows_of(times, "4096 queries", image=512, shape="linear in queries", tokens=150)
    for row, queries in zip(rows, (4096, 16384, 65536), strict=True):
        row["ns_per_query"] = round(1e9 * percentile(times[row["variant"]], 50) / queries, 1)
    keep(rows)
