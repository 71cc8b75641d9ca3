"""What the tests of the attention operators share: inputs, the float64 oracle, error budgets, implementations."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from .variants import ISAS, choose_variant

MAX_REMEMBERED = 128  # results


def remembered(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keeps the latest results by the contents of the arguments: every implementation is held to the same ones."""
    results: OrderedDict[tuple, Tensor] = OrderedDict()

    @functools.wraps(function)
    def result_of(*arguments: Any, **options: Any) -> Tensor:
        key = tuple(map(_content, (*arguments, *sorted(options.items()))))
        if key not in results:
            results[key] = function(*arguments, **options)
        results.move_to_end(key)
        if len(results) > MAX_REMEMBERED:
            results.popitem(last=False)
        return results[key]

    return result_of


def _content(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.dtype, tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def implementation_params() -> list:
    """(implementation, device) of every kernel that can be tested, the CPU kernel once per instruction set level."""
    gpu = ("cuda", "wgmma", "triton", "reference")
    return [
        *(pytest.param((f"cpu:{isa}", "cpu"), id=f"cpu-{isa}") for isa in ISAS),
        pytest.param(("reference", "cpu"), id="reference"),
        *(pytest.param((name, "cuda"), marks=pytest.mark.gpu, id=f"{name}-gpu") for name in gpu),
    ]


def kernel_and_place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict:
    """{"impl", "device", "dtype"} of a parameter of `implementation_params`, its instruction set level being set."""
    variant, device = request.param
    name = choose_variant(variant, monkeypatch)
    # The CUDA C++ kernels take 16 bits only.
    dtype = torch.bfloat16 if name in ("cuda", "wgmma") else torch.float32
    return {"impl": name, "device": device, "dtype": dtype}


def make_qkv(
    batch: int = 2,
    queries: int = 37,
    tokens: int = 19,
    heads: int = 4,
    dim: int = 8,
    *,
    shared: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    scale: float = 1.5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k and v; a context that all images share with `shared`."""
    generator = torch.Generator().manual_seed(batch + queries + tokens + heads + dim)
    contexts = 1 if shared else batch
    shapes = ((batch, queries), (contexts, tokens), (contexts, tokens))
    tensors = (torch.randn(*shape, heads * dim, generator=generator, dtype=torch.float64) for shape in shapes)
    q, k, v = (t.to(dtype).to(device) for t in tensors)
    return q * scale, k, v


def gradient_inputs(shared: bool, tokens: int = 7, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k and v that require gradients, small enough for finite differences."""
    return [x.requires_grad_() for x in make_qkv(2, 11, tokens, 2, 3, shared=shared, dtype=dtype)]


def probabilities(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """P (B, heads, N, L), v by heads, and out as plainly written PyTorch has them in the dtype of the arguments."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    p = torch.softmax(q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale), dim=-1)
    return p, v, (p @ v).transpose(1, 2).flatten(2)


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    scale: float | None = None,
    categories: Tensor | None = None,
    num_categories: int | None = None,
    reduce: str = "mean",
    average_heads: bool = True,
    weight: float = 1.0,
    addend: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator as one would write it without the operator; independent of its reference."""
    p, _, out = probabilities(q, k, v, heads, scale)
    maps = p.mean(1) if average_heads else p
    if categories is not None:
        columns = []
        for category in range(num_categories):
            own = maps[..., categories == category]
            total = own.sum(-1)
            columns.append(total / max(own.shape[-1], 1) if reduce == "mean" else total)
        maps = torch.stack(columns, -1)
    maps = weight * maps
    return out, maps if addend is None else addend.to(maps.dtype) + maps


def error(actual: Tensor, exact: Tensor) -> float:
    """Relative L2 distance."""
    return ((actual.double() - exact).norm() / exact.norm()).item()


def assert_close(
    actual: Tensor, same_dtype: Tensor, exact: Tensor, dtype: torch.dtype, computed_on_gpu: bool | None = None
) -> None:
    """At most twice the error of PyTorch in the same dtype, plus the rounding of one store in that dtype.

    The second term is for cases in which PyTorch happens to round well (few terms, exact products). GPUs add, of the
    numbers between, two units in the last place (2^-23 each) of an exponential, `ex2.approx`, and two of a quotient,
    `div.full`.

    computed_on_gpu: None: if `actual` is there.
    """
    unit = torch.finfo(dtype).eps / 2
    budget = 2 * error(same_dtype, exact) + unit
    if actual.is_cuda if computed_on_gpu is None else computed_on_gpu:
        budget += (2 + 2) * torch.finfo(torch.float32).eps
    assert actual.isfinite().all()
    assert error(actual, exact) <= budget, f"{error(actual, exact):.2e} > {budget:.2e}"


def check_forward(call: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor, heads: int, **kwargs):
    """Runs `call` on the arguments and holds out and maps to float64."""
    out, maps = call(q, k, v, heads, **kwargs)
    exact_out, exact_maps = eager(q.double(), k.double(), v.double(), heads, **kwargs)
    same_out, _ = eager(q, k, v, heads, **kwargs)
    _, same_maps = eager(q.float(), k.float(), v.float(), heads, **kwargs)  # maps are float32 for every input
    assert out.dtype == q.dtype
    assert out.shape == q.shape
    assert maps.dtype == torch.float32
    assert maps.shape == exact_maps.shape
    assert_close(out, same_out, exact_out, q.dtype)
    assert_close(maps, same_maps, exact_maps, torch.float32)
    return out, maps
