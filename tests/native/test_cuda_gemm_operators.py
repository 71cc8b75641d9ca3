"""`linear` and `conv2d` with impl="cuda": interpreted Triton kernels prepare, emulated CUDA kernels multiply."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest
import torch

from vpd_fast import ops
from vpd_fast.errors import InputError
from vpd_fast.kernels import _gemm_cuda
from vpd_fast.ops._dispatch import Op
from vpd_fast.ops.availability import triton_missing
from vpd_fast.ops.packing import FLOAT8, PackedWeight
from vpd_fast.ops.statistics import Statistics, run_length, statistics_shape

from ..ops import gemm_cases
from .cuda_gemm_cases import name_of
from .devices import A100, H200

pytestmark = pytest.mark.skipif(
    triton_missing(torch.empty(0)) is not None, reason="interpreted only without a GPU; tests marked gpu run there"
)


@pytest.fixture
def instructions(request: pytest.FixtureRequest, cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    """The operators take CPU tensors for the emulated device's, which has these instructions."""
    cuda.configure(*(A100 if request.param == "mma" else H200))
    cuda.announce([(0, 2**63, True)])
    named = lambda self, impl, args: next(i for i in self.implementations if i.name == impl)  # noqa: E731
    monkeypatch.setattr(Op, "choose", named)
    monkeypatch.setattr(_gemm_cuda._native, "load", lambda name: {"_C_cuda": cuda}[name])
    monkeypatch.setattr(_gemm_cuda, "INSTRUCTIONS", request.param)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    return request.param


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def make_weight(n: int, k: int, dtype: torch.dtype) -> PackedWeight:
    return PackedWeight.pack(randn(1, n, k) / k**0.5, dtype)


# Of the result, in L2: float32 sums in another order; products of float8 are added with 14 bits, see
# test_sums_of_float8_move_to_float32, and what is cut off is of either sign here. int8 must agree bit by bit.
CLOSE = {torch.int8: 0.0, torch.bfloat16: 2e-6, torch.float16: 2e-6, FLOAT8: 1e-3}
CALLS = [(i, dtype) for i in ("mma", "wgmma", "wgmma_wide") for dtype in CLOSE if (i, dtype) != ("mma", FLOAT8)]
precisions = pytest.mark.parametrize(
    ("instructions", "precision"), CALLS, ids=[f"{i}-{name_of(dtype)}" for i, dtype in CALLS], indirect=["instructions"]
)


def assert_same(actual: torch.Tensor, expected: torch.Tensor, precision: torch.dtype) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    distance = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert distance <= CLOSE[precision], distance


@pytest.mark.parametrize("instructions", ["wgmma"], indirect=True)
@pytest.mark.parametrize("k", [48, 640])
def test_what_tests_allow_where_tensor_cores_add_few_bits(instructions: str, k: int) -> None:
    """The budgets of tests/ops on a GPU, on numbers whose sums need more than 14 bits; float32's are too small."""
    x, weight, bias = gemm_cases.randn(1, 40, k), gemm_cases.make_weight(24, k, FLOAT8), gemm_cases.randn(24)
    actual, reference = (ops.linear(x, weight, bias, impl=impl) for impl in ("cuda", "reference"))
    gemm_cases.assert_within_rounding_to_float8(actual, x.double(), weight, bias, few_bits=True)
    gemm_cases.assert_same_as_reference(actual, reference, weight, exact_rows=True, few_bits=True)
    with pytest.raises(AssertionError):
        gemm_cases.assert_same_as_reference(actual, reference, weight, exact_rows=True)


@pytest.mark.parametrize("instructions", ["mma", "wgmma", "wgmma_wide"], indirect=True)
def test_rounded_rows_and_results(instructions: str) -> None:
    """The two layers of a feed-forward as an engine with static rows calls them, bit by bit but for the gelu."""
    x, residual = randn(2, 21, 32, dtype=torch.bfloat16), randn(2, 21, 32, dtype=torch.bfloat16)
    first, second = make_weight(256, 32, torch.int8), make_weight(32, 160, torch.int8)
    rounding = torch.stack([30 + randn(160).abs(), 10 * randn(160).round()])
    found = []
    for impl in ("cuda", "triton"):
        numbers = torch.empty(2, 21, 32, dtype=torch.int8)
        options = {"rounding": rounding[:, :128], "x_rounding": rounding[:, 128:], "x_out": numbers, "impl": impl}
        hidden = ops.linear(x, first, randn(256), norm="layer", activation="geglu", **options)
        last = ops.linear(hidden if not found else found[0][0], second, randn(32), x2=numbers, residual=residual,
                          out_dtype=torch.bfloat16, impl=impl)  # fmt: skip
        found.append((hidden, numbers, last))
    (hidden, *others), (same, *expected) = found
    distance = (hidden.int() - same.int()).abs()
    assert distance.max() <= 1
    assert (distance > 0).sum() <= 0.001 * distance.numel()
    assert all(torch.equal(actual, other) for actual, other in zip(others, expected, strict=True))


@precisions
def test_linear(instructions: str, precision: torch.dtype) -> None:
    """Rows that are prepared, two sources and such that are not, unaligned memory, and statistics of the result."""
    plain = {"residual": randn(2, 21, 40), "norm": "layer", "affine": randn(2, 2, 48), "scale": randn(48)}
    weight, bias = make_weight(40, 48, precision), randn(40)
    x, x2 = randn(2, 21, 32, dtype=torch.bfloat16), randn(2, 21, 16)
    actual, expected = (ops.linear(x, weight, bias, x2=x2, impl=impl, **plain) for impl in ("cuda", "triton"))
    assert actual.dtype == torch.bfloat16
    assert_same(actual.float(), expected.float(), precision if precision == torch.int8 else FLOAT8)
    if precision in (torch.bfloat16, torch.float16):
        wide = randn(2, 21, 100, dtype=precision)
        sources = wide[..., 3:35], wide[..., 50:66]
        options = {"x2": sources[1], "out_dtype": torch.float32}
        actual, expected = (ops.linear(sources[0], weight, impl=impl, **options) for impl in ("cuda", "triton"))
        assert_same(actual, expected, precision)
    found = []
    for impl in ("cuda", "triton"):
        known = Statistics(torch.full(statistics_shape(2, 21, 40), torch.nan), run_length(21))
        out = ops.linear(x.float(), weight, x2=x2, statistics=known, impl=impl)
        found.append((out, known.data))
    assert_same(found[0][0], found[1][0], precision)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-2, atol=1e-2)


@precisions
@pytest.mark.parametrize("stride", [1, 2])
def test_conv2d(instructions: str, precision: torch.dtype, stride: int) -> None:
    """An image that is rounded and padded before, and one whose padding the kernel supplies."""
    weight, bias = make_weight(24, 9 * 48, precision), randn(24)
    how = {"kernel": (3, 3), "stride": stride, "padding": (0, 1, 1, 1) if stride == 2 else 1}
    x, x2, affine = randn(2, 9, 8, 32), randn(2, 9, 8, 16, dtype=torch.bfloat16), randn(2, 2, 48)
    options = {**how, "x2": x2, "affine": affine, "silu": True}
    actual, expected = (ops.conv2d(x, weight, bias, impl=impl, **options) for impl in ("cuda", "triton"))
    assert_same(actual, expected, precision)
    if precision in (torch.bfloat16, torch.float16):
        sources = x.to(precision), x2.to(precision)
        options = {**how, "x2": sources[1], "out_dtype": torch.float32, "activation": "relu"}
        actual, expected = (ops.conv2d(sources[0], weight, bias, impl=impl, **options) for impl in ("cuda", "triton"))
        assert_same(actual, expected, precision)


@precisions
def test_geglu(instructions: str, precision: torch.dtype) -> None:
    x, weight, bias = randn(1, 30, 80), make_weight(192, 80, precision), randn(192)
    actual, expected = (ops.linear(x, weight, bias, activation="geglu", impl=impl) for impl in ("cuda", "triton"))
    assert_same(actual, expected, precision if precision != torch.int8 else torch.bfloat16)


@pytest.mark.parametrize("instructions", ["mma", "wgmma"], indirect=True)
def test_what_the_kernels_refuse_is_an_error(instructions: str) -> None:
    with pytest.raises(InputError, match="multiple of 16 bytes"):
        ops.linear(randn(1, 5, 20), make_weight(8, 20, torch.int8), impl="cuda")
