"""linear and conv2d by cuBLAS and cuDNN: in place of the kernels' sums they keep the same budgets, on a GPU and here.

What they refuse is in test_gpu_decisions.py.
"""

from __future__ import annotations

import pytest
import torch

from vpd_fast.ops.availability import triton_missing
from vpd_fast.ops.packing import FLOAT8
from vpd_fast.ops.statistics import Statistics, run_length, statistics_shape

from . import test_conv2d, test_linear
from .gemm_cases import make_weight, randn
from .on_device import ops

pytestmark = [
    pytest.mark.skipif(
        triton_missing(torch.empty(0)) is not None and not torch.cuda.is_available(), reason="no Triton"
    ),
    *([pytest.mark.gpu] if torch.cuda.is_available() else []),
]
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
PRECISIONS = [torch.float32, BFLOAT16, FLOAT16, torch.int8, FLOAT8]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_linear_keeps_the_budget(precision: torch.dtype) -> None:
    x, x2, residual = randn(2, 40, 48), randn(2, 40, 16, dtype=BFLOAT16), randn(2, 40, 32)
    weight = make_weight(64, 64, precision)
    test_linear.check("library", x, weight, randn(64), x2=x2, norm="layer", activation="geglu", residual=residual)
    test_linear.check("library", x.bfloat16(), make_weight(32, 48, precision), out_dtype=BFLOAT16)


@pytest.mark.parametrize("precision", [BFLOAT16, FLOAT16])
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, (0, 0, 1, 1)), (2, 1)])
def test_convolutions_keep_the_budget(stride: int, padding: int | tuple[int, ...], precision: torch.dtype) -> None:
    """Of prepared images, and of those that are read as they are, if their padding is symmetric."""
    x, weight = randn(2, 9, 8, 16).to(precision), make_weight(24, 144, precision)
    how = {"kernel": (3, 3), "stride": stride, "padding": padding}
    out = test_conv2d.check("library", x, weight, randn(24), affine=randn(2, 2, 16), silu=True, **how)
    if padding == 1:
        test_conv2d.check("library", x, weight, randn(24), residual=randn(*out.shape), activation="silu", **how)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_positions_keep_the_budget(precision: torch.dtype) -> None:
    """A convolution that reads one position is a product of rows; images of 8 bits have one scale each."""
    how = {"kernel": (1, 1), "affine": randn(2, 2, 32), "residual": randn(2, 5, 8, 16)}
    test_conv2d.check("library", randn(2, 5, 8, 32), make_weight(16, 32, precision), randn(16), **how)


def test_statistics_are_of_what_is_stored() -> None:
    x, weight = randn(2, 8, 8, 16, dtype=BFLOAT16), make_weight(24, 144, BFLOAT16)
    found = []
    for impl in ("library", "reference"):
        statistics = Statistics(torch.full(statistics_shape(2, 64, 24), torch.nan), run_length(64))
        out = ops.conv2d(x, weight, kernel=(3, 3), padding=1, silu=True, statistics=statistics, impl=impl)
        found.append((out.float(), statistics.data))
    (out, data), (expected, expected_data) = found
    assert (out.mean((1, 2)) - expected.mean((1, 2))).abs().max() <= torch.finfo(BFLOAT16).eps * expected.abs().max()
    # The same but for numbers that are stored a unit apart, as are the outputs.
    torch.testing.assert_close(data, expected_data, rtol=0.1, atol=float(torch.finfo(BFLOAT16).eps * 8))


def test_results_repeat_bit_for_bit() -> None:
    """Whatever order cuDNN's algorithms could choose from."""
    x, weight = randn(1, 8, 8, 32, dtype=BFLOAT16), make_weight(32, 288, BFLOAT16)
    first, second = (ops.conv2d(x, weight, kernel=(3, 3), padding=1, silu=True, impl="library") for _ in range(2))
    assert torch.equal(first, second)
