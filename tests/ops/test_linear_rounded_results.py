"""Results that are rounded to int8 by factors and shifts of their columns, and products of such numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vpd_fast.errors import InputError
from vpd_fast.ops.packing import PackedWeight
from vpd_fast.ops.rounding import round_columns

from .attention_cases import make_qkv
from .gemm_cases import make_weight, randn
from .on_device import ops

IMPLEMENTATIONS = ("triton", "reference")


def rounding_of(columns: int, steps: float) -> Tensor:
    """Factors of 1 to 2 times so many steps for a distance of 1, and shifts."""
    return torch.stack([steps * (1 + torch.rand(columns)), torch.randint(-60, 60, (columns,)).float()])


def numbers_of(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def test_rounding() -> None:
    """To nearest, ties to even, saturated; what is not finite, too."""
    x = torch.tensor([0.0, 0.25, 0.75, 1.0, -1000.0, 1000.0, float("inf"), float("-inf"), float("nan")])
    rounding = torch.tensor([2.0, -3.0])[:, None].expand(2, 9)
    assert round_columns(x, rounding).tolist() == [-3, -2, -2, -1, -128, 127, 127, -128, -128]
    assert round_columns(randn(3, 5, dtype=torch.bfloat16), rounding_of(5, 9.0)).dtype == torch.int8


@pytest.mark.parametrize("precision", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "relu", "silu", "geglu"])
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 3, 32), (37, 48, 96), (70, 1100, 64)])
def test_results_of_linear(impl: str, rows: int, k: int, n: int, activation, precision: torch.dtype) -> None:
    """They are its float32 results, rounded; also those of sums that programs share."""
    out_columns = n // 2 if activation == "geglu" else n
    x, weight, bias, rounding = randn(2, rows, k), make_weight(n, k, precision), randn(n), rounding_of(out_columns, 20)
    residual = randn(2, rows, out_columns, dtype=torch.bfloat16)
    options = {"activation": activation, "residual": residual}
    exact = ops.linear(x, weight, bias, **options, impl=impl)
    out = ops.linear(x, weight, bias, **options, rounding=rounding, impl=impl)
    assert torch.equal(out, round_columns(exact, rounding))
    assert len(out.unique()) > 20


def test_results_may_lie_anywhere(impl: str) -> None:
    x, weight, rounding = randn(2, 9, 32), make_weight(40, 32, torch.int8), rounding_of(60, 20.0)[:, 20:]
    memory = torch.zeros(2, 9, 50, dtype=torch.int8)
    out = ops.linear(x, weight, rounding=rounding, out=memory[..., 5:45], impl=impl)
    assert torch.equal(out, ops.linear(x, weight, rounding=rounding.contiguous(), impl=impl))
    assert not memory[..., :5].any()
    assert not memory[..., 45:].any()


@pytest.mark.parametrize("second", [0, 16, 51])
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 1, 1), (37, 48, 33), (70, 1100, 64)])
def test_rows_that_were_rounded_before(impl: str, rows: int, k: int, n: int, second: int) -> None:
    """Sums of their products are exact, and there is one rounding for the scale and one for the bias."""
    x, x2 = numbers_of(2, rows, k), numbers_of(2, rows, second) if second else None
    weight, bias, residual = make_weight(n, k + second, torch.int8), randn(n), randn(2, rows, n)
    actual = ops.linear(x, weight, bias, x2=x2, residual=residual, out_dtype=torch.float32, impl=impl)
    joined = x if x2 is None else torch.cat([x, x2], -1)
    sums = joined.double() @ weight.numbers()[0].double().T
    assert weight.scales is not None
    assert torch.equal(actual, sums.float() * weight.scales[0] + bias + residual)


@pytest.mark.parametrize("precision", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_input_is_stored_as_well(impl: str, dtype: torch.dtype, precision: torch.dtype) -> None:
    """Where rows are normalised: x as it was before, beside the usual result."""
    x, weight, rounding = randn(2, 21, 48, dtype=dtype), make_weight(40, 48, precision), rounding_of(48, 30.0)
    memory = torch.zeros(2, 21, 60, dtype=torch.int8)
    copy = {"x_rounding": rounding, "x_out": memory[..., 4:52]}
    out = ops.linear(x, weight, norm="layer", **copy, impl=impl)
    assert torch.equal(out, ops.linear(x, weight, norm="layer", impl=impl))
    assert torch.equal(memory[..., 4:52], round_columns(x, rounding))
    assert not memory[..., :4].any()
    assert not memory[..., 52:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 40, 130])
@pytest.mark.parametrize("maps", [False, True])
def test_results_of_attention(impl: str, maps: bool, dim: int, dtype: torch.dtype) -> None:
    """Within one step of float64's: before they are rounded, they differ by less than that."""
    q, k, v = make_qkv(2, 19, 37, 2, dim, dtype=dtype)
    rounding = rounding_of(2 * dim, 20)
    if maps:
        into = torch.zeros(2, 19, 37)
        out = ops.cross_attention_maps_into(q, k, v, into, 2, rounding=rounding, impl=impl)
        plain = torch.zeros(2, 19, 37)
        ops.cross_attention_maps_into(q, k, v, plain, 2, impl=impl)
        assert torch.equal(into, plain)
    else:
        out = ops.self_attention(q, k, v, 2, rounding=rounding, impl=impl)
    exact = ops.self_attention(q.double(), k.double(), v.double(), 2, impl="reference")
    distance = out.double() - (exact * rounding[0] + rounding[1]).clamp(-128, 127)
    assert distance.abs().max() <= (0.501 if dtype == torch.float32 else 1.0)
    assert len(out.unique()) > 100


def test_one_token() -> None:
    q, k, v = make_qkv(2, 5, 1, 2, 8)
    rounding = rounding_of(16, 20.0)
    out = ops.cross_attention_maps_into(q, k, v, torch.zeros(2, 5, 1), 2, rounding=rounding)
    assert torch.equal(out, round_columns(v.expand(2, 5, 16), rounding))


def test_what_does_not_round_refuses() -> None:
    q, k, v = make_qkv(2, 5, 7, 2, 8)
    attention = ops.explain("self_attention", q, k, v, 2, rounding=rounding_of(16, 1.0))
    assert attention["reference"] == "ok"
    assert "rounded to int8" in attention["cpu"]
    assert "rounded to int8" in attention["sdpa"]
    linear = ops.explain("linear", randn(1, 5, 8), make_weight(8, 8, torch.int8), rounding=rounding_of(8, 1.0))
    assert "for GPUs" in linear["cpu"]
    assert (
        "for GPUs"
        in ops.explain("linear", numbers_of(1, 5, 8), make_weight(8, 8, torch.int8), out_dtype=torch.float32)["cpu"]
    )


WEIGHT = PackedWeight.pack(torch.randn(1, 6, 8), torch.int8)
X = torch.zeros(2, 5, 8)
NUMBERS = torch.zeros(2, 5, 8, dtype=torch.int8)
COPY = {"x_rounding": torch.ones(2, 8), "x_out": NUMBERS}


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (X, {"rounding": torch.ones(2, 5)}, "rounding must have shape"),
        (X, {"rounding": torch.ones(2, 6, dtype=torch.float64)}, "rounding must be torch.float32"),
        (X, {"rounding": torch.ones(2, 6), "out_dtype": torch.float32}, "out_dtype must be"),
        (X, {"rounding": torch.ones(2, 6), "out": torch.zeros(2, 5, 6)}, "out must be torch.int8"),
        (X, {"out_dtype": torch.int8}, "out_dtype must be"),
        (NUMBERS, {}, "out_dtype must be given"),
        (NUMBERS, {"out_dtype": torch.float32, "norm": "layer"}, "no prologue"),
        (NUMBERS, {"out_dtype": torch.float32, "scale": torch.ones(8)}, "no prologue"),
        (NUMBERS[..., :4], {"out_dtype": torch.float32, "x2": X[..., :4]}, "x2 must be torch.int8"),
        (X[..., :4], {"x2": NUMBERS[..., :4]}, "x2 must be"),
        (X, COPY, "is for norm"),
        (X, {"norm": "layer", "x_out": NUMBERS}, "belong together"),
        (X, {"norm": "layer", **COPY, "x_out": NUMBERS[:, :4]}, "x_out must have shape"),
        (X, {"norm": "layer", **COPY, "x_out": NUMBERS[:, :1].expand(2, 5, 8)}, "must not be expanded"),
        (X, {"norm": "layer", **COPY, "x_out": torch.zeros(2, 8, 5, dtype=torch.int8).mT}, "next to each other"),
    ],
)
def test_bad_input(x: Tensor, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ops.linear(x, WEIGHT, **options)


def test_bad_weight() -> None:
    with pytest.raises(InputError, match="weight must be int8 as x is"):
        ops.linear(NUMBERS, PackedWeight.pack(torch.randn(1, 6, 8), torch.bfloat16), out_dtype=torch.float32)


def test_bad_attention() -> None:
    q, k, v = make_qkv(2, 5, 7, 2, 8)
    with pytest.raises(InputError, match="rounding must have shape"):
        ops.self_attention(q, k, v, 2, rounding=torch.ones(2, 8))
    with pytest.raises(InputError, match=r"out must be torch.int8"):
        ops.self_attention(q, k, v, 2, rounding=torch.ones(2, 16), out=torch.zeros(2, 5, 16))
    maps = torch.zeros(2, 5, 7)
    with pytest.raises(InputError, match="requires gradients"):
        ops.cross_attention_maps_into(q.requires_grad_(), k, v, maps, 2, rounding=torch.ones(2, 16))
