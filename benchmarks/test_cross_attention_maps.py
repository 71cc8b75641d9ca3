"""cross_attention_maps at VPD's shapes, against eager PyTorch, SDPA without maps, SDPA with a second pass for the maps,
and torch.compile of the eager form.

The large cases (1024x1024 images, batch 8) are marked slow. Cases whose probabilities would not fit are skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vpd_fast import ops
from vpd_fast.bench import suites
from vpd_fast.bench.attention import eager_with_maps, require_parity, sdpa, sdpa_and_maps
from vpd_fast.bench.suites import DTYPES, EXHAUSTIVE, Variants, side_by_side

HEADS = 8
# Image side -> (queries, head dimension, layers) of the UNet's 16 cross-attentions.
SHAPES = {
    512: ((4096, 40, 5), (1024, 80, 5), (256, 160, 5), (64, 160, 1)),
    1024: ((16384, 40, 5), (4096, 80, 5), (1024, 160, 5), (256, 160, 1)),
}
TOKENS = (1, 40, 77, 150, 847)
MAIN = (512, 0, 150, 1)  # image side, index in SHAPES, tokens, batch
TYPICAL = (MAIN, (512, 1, 40, 1))
MOST_PROBABILITIES = 1 << 29  # of one layer: eager PyTorch holds three tensors of this many numbers
PEERS = ("eager", "sdpa without maps", "sdpa and maps", "compiled eager")  # SDPA's float32 on GPUs is partly TF32
TRAINING = {"cpu": "float32", "cuda": "bfloat16"}
# Between two gradients. float32: sums over 4096 queries err by about 64 roundings of 2^-24 in either, so 1e-5. 16 bits:
# two times five products are rounded to 2^-9, so 2e-2.
GRADIENT_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def inputs(shape: tuple[int, int, int], tokens: int, batch: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q and, for a context that all images share, k and v."""
    queries, dim, _ = shape
    random, sizes = suites.random_tensors(device), ((batch, queries), (1, tokens), (1, tokens))
    return [random(*size, HEADS * dim).to(dtype) for size in sizes]


def keep_rows(keep: Callable, variants: Variants, tensors: list[Tensor], passes: float, **facts: Any) -> None:
    """Measure and keep a row of each variant. passes: the work in forwards (two products); 3.5 with the backward."""
    q, k, v = tensors
    maps = q.shape[0] * q.shape[1] * k.shape[1]
    facts["gigabytes"] = ((2 * q.numel() + k.numel() + v.numel()) * q.element_size() + 4 * maps) / 1e9 * passes
    facts["gflop"] = 4 * maps * q.shape[2] / 1e9 * passes
    rows = side_by_side(variants, q.device.type, "eager", peak_of=facts["dtype"], **facts)
    sdpa_ms = next(row["p50_ms"] for row in rows if row["variant"].startswith("sdpa"))
    keep([row | {"over_sdpa": round(sdpa_ms / row["p50_ms"], 2)} for row in rows])


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


@suites.on_devices("dtype", suites.CPU_DTYPES, suites.CPU_DTYPES)
@pytest.mark.parametrize("case", all_cases())
def test_forward(case: tuple[int, int, int, int], dtype: str, device: str, keep: Callable) -> None:
    side, index, tokens, batch = case
    queries, dim, layers = SHAPES[side][index]
    if batch * HEADS * queries * tokens > MOST_PROBABILITIES:
        pytest.skip(
            "eager PyTorch would hold more than 6 GB of probabilities; the tests have the operator alone at such sizes"
        )
    tensors = q, k, v = inputs(SHAPES[side][index], tokens, batch, DTYPES[dtype], device)
    wide = [x.expand(batch, -1, -1) for x in (k, v)]  # the others know no shared context
    variants: Variants = {
        "eager": lambda: eager_with_maps(q, k, v, HEADS),
        "sdpa without maps": lambda: sdpa(q, *wide, HEADS),
        "sdpa and maps": lambda: sdpa_and_maps(q, *wide, HEADS),
    }
    if tokens == 1:  # a constant: no kernel
        variants["constant"] = lambda: ops.cross_attention_maps(q, k, v, HEADS)
    else:
        if case == MAIN:
            compiled = torch.compile(eager_with_maps, fullgraph=True, dynamic=False)
            variants["compiled eager"] = lambda: compiled(q, k, v, HEADS)
        variants |= suites.variants_of(
            "cross_attention_maps",
            device,
            lambda impl: ops.cross_attention_maps(q, k, v, HEADS, impl=impl),
            case == MAIN,
        )
    require_parity(variants, q, k, v, HEADS, PEERS)
    facts = {"image": side, "shape": f"{batch}x{queries}x{HEADS}x{dim}", "tokens": tokens, "layers": layers}
    keep_rows(keep, variants, tensors, 1, **facts, dtype=dtype, seconds=10.0 if case == MAIN else 2.0)


def require_same_gradients(variants: Variants, expected: tuple[Tensor, ...]) -> None:
    """No time is reported unless gradients agree with eager's."""
    for name, variant in variants.items():
        for a, b in zip(variant(), expected, strict=True):
            error = ((a - b).norm() / b.norm()).item()
            assert error <= GRADIENT_LIMITS[a.dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize("tokens", [pytest.param(40, marks=EXHAUSTIVE), 150])
def test_training_step(tokens: int, device: str, keep: Callable) -> None:
    """Forward and backward, maps detached: autograd through eager PyTorch, through SDPA, through the operator."""
    dtype = TRAINING[device]
    tensors = [x.requires_grad_() for x in inputs(SHAPES[512][0], tokens, 1, DTYPES[dtype], device)]
    grad = torch.randn(tensors[0].shape).to(tensors[0])
    forwards = {
        "eager": lambda *t: eager_with_maps(*t)[0],
        "sdpa without maps": sdpa,
        "operator": lambda *t: ops.cross_attention_maps(*t)[0],
    }
    variants: Variants = {
        name: lambda f=forward: torch.autograd.grad(f(*tensors, HEADS), tensors, grad)
        for name, forward in forwards.items()
    }
    require_same_gradients(variants, variants["eager"]())
    facts = {"image": 512, "shape": "training step", "tokens": tokens, "dtype": dtype}
    keep_rows(keep, variants, tensors, 3.5, **facts, seconds=5.0)


def test_backward_alone(device: str, keep: Callable) -> None:
    """With gradients of the maps: the operator's backward against autograd through eager PyTorch."""
    dtype = TRAINING[device]
    tensors = [x.requires_grad_() for x in inputs(SHAPES[512][1], 150, 1, DTYPES[dtype], device)]
    q, k, v = (x.detach() for x in tensors)
    grads = torch.randn(q.shape).to(q), torch.randn(1, q.shape[1], 150).to(device)
    results, without_maps = eager_with_maps(*tensors, HEADS), sdpa(*tensors, HEADS)
    variants: Variants = {
        "eager": lambda: torch.autograd.grad(results, tensors, grads, retain_graph=True),
        "sdpa without maps": lambda: torch.autograd.grad(without_maps, tensors, grads[0], retain_graph=True),
        "operator": lambda: ops.cross_attention_maps_backward(*grads, q, k, v, HEADS),
    }
    require_same_gradients({"operator": variants["operator"]}, variants["eager"]())
    facts = {"image": 512, "shape": "backward with maps, 1x1024x8x80", "tokens": 150, "dtype": dtype}
    # Autograd runs a backward on the stream of its forward, which is not the one of a capture.
    keep_rows(keep, variants, [q, k, v], 2.5, **facts, seconds=5.0, graphs=False)


def test_mean_of_five_layers_into_features(device: str, keep: Callable) -> None:
    """The 32x32 level: five layers, the mean of their maps behind 640 channels of a features tensor."""
    dtype = DTYPES[TRAINING[device]]
    layers = [inputs(SHAPES[512][1], 150, 1, dtype, device) for _ in range(5)]
    features = torch.randn(1, 640, 32, 32).to(device, dtype)
    whole = torch.empty(1, 790, 32, 32, device=device, dtype=dtype)
    sums = torch.empty(1, 1024, 150, device=device)

    def eagerly() -> Tensor:
        maps = sum(eager_with_maps(*layer, HEADS)[1] for layer in layers) / 5
        return torch.cat([features, maps.transpose(1, 2).unflatten(2, (32, 32)).to(dtype)], dim=1)

    def on_the_fly() -> Tensor:
        for i, layer in enumerate(layers[:-1]):
            ops.cross_attention_maps_into(*layer, sums, HEADS, weight=0.2, accumulate=i > 0)
        whole[:, :640] = features
        ops.cross_attention_maps_into(*layers[-1], whole[:, 640:], HEADS, weight=0.2, addend=sums)
        return whole

    expected = eagerly()
    assert ((on_the_fly() - expected).norm() / expected.norm()).item() <= torch.finfo(dtype).eps
    facts = {"image": 512, "shape": "five layers into features", "tokens": 150, "dtype": TRAINING[device]}
    keep(side_by_side({"eager": eagerly, "operator": on_the_fly}, device, seconds=3, **facts))


@EXHAUSTIVE
def test_linear_in_queries(device: str, keep: Callable) -> None:
    """Time per query should not depend on their number: rows for 4096, 16384 and 65536 queries."""
    numbers, variants = (4096, 16384, 65536), {}
    for queries in numbers:
        tensors = inputs((queries, 40, 1), 150, 1, DTYPES[TRAINING[device]], device)
        variants[f"{queries} queries"] = lambda t=tensors: ops.cross_attention_maps(*t, HEADS)
    rows = side_by_side(variants, device, seconds=5, image=512, shape="linear in queries", tokens=150)
    keep([row | {"ns_per_query": round(1e6 * row["p50_ms"] / n, 1)} for row, n in zip(rows, numbers, strict=True)])
