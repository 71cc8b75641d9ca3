"""linear in the formats that only GPUs compute in, float8_e4m3fn and float16, and statistics of its result."""

from __future__ import annotations

import pytest
import torch

from vpd_fast.errors import InputError
from vpd_fast.ops.packing import FLOAT8

from .gemm_cases import make_weight, randn
from .on_device import ops
from .statistics_cases import assert_statistics, empty_statistics
from .test_linear import PROLOGUES, check

IMPLEMENTATIONS = ("triton", "reference")
FORMATS = [FLOAT8, torch.float16]


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (5, 3, 16), (25, 17, 33), (97, 40, 48), (7, 320, 64), (3, 2100, 40)]
)
def test_sizes(impl: str, m: int, k: int, n: int, precision: torch.dtype) -> None:
    check(impl, randn(2, m, k), make_weight(n, k, precision), randn(n), exact_rows=True)


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("parts", PROLOGUES, ids="+".join)
@pytest.mark.parametrize("second", [0, 21])
def test_prologue(impl: str, second: int, parts: tuple[str, ...], precision: torch.dtype) -> None:
    k = 37 + second
    whole = {"norm": "layer", "affine": 1 + 0.3 * randn(3, 2, k), "scale": 1 + randn(k).abs()}
    x, x2 = 3 + 2 * randn(3, 11, 37), randn(3, 11, second, dtype=torch.float16) if second else None
    check(impl, x, make_weight(18, k, precision), randn(18), x2=x2, **{name: whole[name] for name in parts})


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("activation", [None, "relu", "silu", "geglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations(impl: str, activation: str | None, dtype: torch.dtype, precision: torch.dtype) -> None:
    residual = randn(2, 14, 32 if activation == "geglu" else 64, dtype=dtype)
    x, weight = 4 * randn(2, 14, 40, dtype=dtype), make_weight(64, 40, precision)
    check(impl, x, weight, randn(64), activation=activation, residual=residual, exact_rows=True)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_row(impl: str, special: float) -> None:
    x, weight = randn(1, 30, 37), make_weight(40, 37, FLOAT8)
    expected = ops.linear(x, weight, impl=impl)
    x[0, 13, 20] = special
    out, others = ops.linear(x, weight, impl=impl), torch.arange(30) != 13
    assert out[0, 13].isnan().all()
    assert torch.equal(out[:, others], expected[:, others])


def test_numbers_that_float8_holds_exactly(impl: str) -> None:
    """All of them, from the smallest to 448, times 1: what comes out is what went in, in every binade."""
    numbers = torch.arange(127, dtype=torch.uint8).view(FLOAT8).float()  # 0 to 448
    x = torch.cat([numbers, -numbers])[None, :, None] * torch.tensor([1.0, 0.0])
    x[0, :, 1] = 448
    weight = make_weight(2, 2, FLOAT8)
    weight.data.copy_(torch.eye(2)[None].to(FLOAT8))
    weight.scales.fill_(1)
    assert torch.equal(ops.linear(x, weight, impl=impl), x)


def test_zero_rows_give_the_bias(impl: str) -> None:
    bias = randn(40)
    for value in (0.0, -0.0, 1e-41):
        out = ops.linear(torch.full((1, 3, 24), value), make_weight(40, 24, FLOAT8), bias, impl=impl)
        assert torch.equal(out, bias.expand(1, 3, -1))


@pytest.mark.parametrize("precision", FORMATS)
def test_cpus_have_no_kernel(precision: torch.dtype) -> None:
    with pytest.raises(InputError, match=f"no native kernel computes in {str(precision).removeprefix('torch.')}"):
        ops.linear(randn(1, 4, 8), make_weight(4, 8, precision), impl="cpu")


@pytest.mark.parametrize("activation", [None, "geglu"])
@pytest.mark.parametrize(
    ("precision", "rows", "n", "k"),
    [
        *((precision, 64, 40, 24) for precision in (torch.float32, torch.bfloat16, torch.int8, FLOAT8)),
        (torch.float32, 128, 70, 33),
        (torch.float32, 100, 20, 16),
        (torch.int8, 64, 64, 1100),
    ],
)
def test_statistics(impl: str, precision: torch.dtype, rows: int, n: int, k: int, activation: str | None) -> None:
    """Whole runs in a tile, runs that are none, and sums that several programs share."""
    n = 64 if activation else n
    x, weight, n_out = randn(2, rows, k), make_weight(n, k, precision), n // 2 if activation else n
    statistics, residual = empty_statistics(2, rows, n_out), 5 + randn(2, rows, n_out)
    options = {"activation": activation, "residual": residual, "out_dtype": torch.bfloat16, "impl": impl}
    out = ops.linear(x, weight, randn(n), statistics=statistics, **options)
    assert torch.equal(out, ops.linear(x, weight, randn(n), **options))
    assert_statistics(statistics, out)


def test_native_kernels_find_no_statistics() -> None:
    with pytest.raises(InputError, match="statistics and ranges are for kernels that round whole images"):
        ops.linear(
            *(randn(1, 64, 8), make_weight(4, 8, torch.float32)), statistics=empty_statistics(1, 64, 4), impl="cpu"
        )
