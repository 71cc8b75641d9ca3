"""conv2d in the formats that only GPUs compute in, with known ranges of its input and statistics of its result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vpd_fast.errors import InputError
from vpd_fast.ops import _gemm_reference
from vpd_fast.ops.packing import FLOAT8
from vpd_fast.ops.statistics import Statistics

from .gemm_cases import WITHIN_ROUNDING, assert_same_as_reference, make_weight, randn
from .on_device import ops
from .statistics_cases import assert_statistics, empty_statistics
from .test_conv2d import GEOMETRIES, check, rows_of
from .variants import computed_on_gpu

IMPLEMENTATIONS = ("triton", "reference")


@pytest.mark.parametrize("precision", [FLOAT8, torch.float16])
@pytest.mark.parametrize("channels", [4, 21])
@pytest.mark.parametrize(("height", "width", "kernel", "stride", "padding"), GEOMETRIES[3:16:2])
def test_geometry(impl: str, height, width, kernel, stride, padding, channels: int, precision) -> None:
    weight = make_weight(19, kernel[0] * kernel[1] * channels, precision)
    x, how = randn(2, height, width, channels), {"kernel": kernel, "stride": stride, "padding": padding}
    check(impl, x, weight, randn(19), exact_rows=True, **how)
    check(impl, x, weight, affine=randn(2, 2, channels), **how)


@pytest.mark.parametrize("precision", [FLOAT8, torch.float16])
@pytest.mark.parametrize("second", [0, 5])
def test_transforms(impl: str, second: int, precision: torch.dtype) -> None:
    channels = 18 + second
    whole = {"affine": 3 + randn(2, 2, channels), "silu": True, "scale": 1 + randn(channels).abs()}
    x, x2 = randn(2, 6, 5, 18), randn(2, 6, 5, second, dtype=torch.float16) if second else None
    weight = make_weight(22, 9 * channels, precision)
    check(impl, x, weight, randn(22), x2=x2, kernel=(3, 3), padding=1, **whole)


def test_float8_of_an_image_that_is_not_finite(impl: str) -> None:
    x, weight, how = randn(2, 9, 8, 5), make_weight(20, 45, FLOAT8), {"kernel": (3, 3), "padding": 1}
    expected = ops.conv2d(x, weight, impl=impl, **how)
    x[0, 3, 4, 2] = float("inf")
    out = ops.conv2d(x, weight, impl=impl, **how)
    assert out[0, 2:5, 3:6].isnan().all()
    assert torch.equal(out[1], expected[1])


def parts_of(a: Tensor, parts: int) -> Tensor:
    """Ranges (B, 2, parts) of a (B, ..., C), each part some channels."""
    chunks = a.flatten(1, -2).tensor_split(parts, dim=2)
    return torch.stack([torch.stack([c.amin((1, 2)), c.amax((1, 2))], 1) for c in chunks], 2).float()


@pytest.mark.parametrize("precision", [torch.int8, FLOAT8])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("wider", [1.0, 1.3])
def test_known_ranges(impl: str, parts: int, wider: float, precision: torch.dtype) -> None:
    """The scale is what the ranges say, be they exact or too wide."""
    x, affine, weight, bias = randn(2, 7, 6, 12), randn(2, 2, 12), make_weight(17, 108, precision), randn(17)
    a = _gemm_reference.prologue(x, affine, True, None)
    ranges = wider * parts_of(a, parts)
    options = {"kernel": (3, 3), "padding": 1, "affine": affine, "silu": True}
    actual = ops.conv2d(x, weight, bias, ranges=ranges, impl=impl, **options)
    exact = rows_of(x, None, affine, True, None, (3, 3), 1, 1, torch.float64)
    ends = torch.stack([ranges[:, 0].amin(1), ranges[:, 1].amax(1)], 1).double()[:, None, None]
    few_bits = computed_on_gpu(impl)
    WITHIN_ROUNDING[precision](actual, exact, weight, bias, ends, few_bits)
    reference = ops.conv2d(x, weight, bias, ranges=ranges, impl="reference", **options)
    assert_same_as_reference(actual, reference, weight, few_bits=few_bits)


@pytest.mark.parametrize("precision", [torch.int8, FLOAT8])
def test_unknown_ranges_of_one_image_make_it_nan(impl: str, precision: torch.dtype) -> None:
    x, weight = randn(2, 4, 4, 8), make_weight(9, 8, precision)
    ranges = parts_of(x, 4)
    ranges[0, 0, 2] = torch.nan
    out = ops.conv2d(x, weight, kernel=(1, 1), silu=True, ranges=ranges, impl=impl)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.int8, FLOAT8])
@pytest.mark.parametrize(
    ("height", "width", "n", "channels"), [(8, 8, 40, 6), (16, 16, 33, 4), (5, 7, 16, 4), (4, 4, 64, 260)]
)
def test_statistics(impl: str, height: int, width: int, n: int, channels: int, precision: torch.dtype) -> None:
    x, weight = 3 + randn(2, height, width, channels), make_weight(n, 9 * channels, precision)
    statistics, options = empty_statistics(2, height * width, n), {"kernel": (3, 3), "padding": 1, "impl": impl}
    out = ops.conv2d(x, weight, statistics=statistics, **options)
    assert torch.equal(out, ops.conv2d(x, weight, **options))
    assert_statistics(statistics, out)


def test_statistics_of_a_part_of_the_result(impl: str) -> None:
    """As of one of four phases: results apart in memory, statistics behind those of another part."""
    x, weight, options = randn(2, 8, 8, 4), make_weight(12, 16, torch.bfloat16), {"kernel": (2, 2), "impl": impl}
    whole, out = empty_statistics(2, 128, 12), torch.full((2, 16, 16, 12), torch.nan)
    runs = whole.data.shape[1] // 2
    part = replace(whole, data=whole.data[:, runs:])
    ops.conv2d(x, weight, padding=(1, 0, 0, 1), out=out[:, ::2, 1::2], statistics=part, **options)
    assert whole.data[:, :runs].isnan().all()
    assert_statistics(part, out[:, ::2, 1::2])


X = torch.zeros(2, 8, 8, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranges": torch.zeros(2, 3)}, r"ranges must have shape \(B=2, 2=2, parts\), got \(2, 3\)"),
        ({"statistics": torch.zeros(2, 1, 5, 6)}, "statistics must be Statistics, got Tensor"),
        (
            {"statistics": Statistics(torch.zeros(2, 1, 5, 6), 16)},
            r"statistics.data must have shape \(B=2, runs=4, 5=5, C=6\), got \(2, 1, 5, 6\)",
        ),
        (
            {"impl": "cpu", "ranges": torch.zeros(2, 2, 1)},
            "statistics and ranges are for kernels that round whole images",
        ),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ops.conv2d(**{"x": X, "weight": make_weight(6, 4, torch.int8), "kernel": (1, 1), **change})
