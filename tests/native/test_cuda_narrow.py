"""Convolutions that read few numbers per position, emulated: `conv2d` with impl="cuda_rows"."""

from __future__ import annotations

import pytest
import torch

from vpd_fast import ops
from vpd_fast.kernels import _narrow_cuda
from vpd_fast.ops._dispatch import registry
from vpd_fast.ops.packing import PackedWeight
from vpd_fast.ops.statistics import Statistics

from .test_cuda_gemm_operators import instructions, make_weight, pytestmark, randn  # noqa: F401

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
emulated = pytest.mark.parametrize("instructions", ["wgmma", "mma"], indirect=True)  # sm_90 and sm_80


def whole(*shape: int, dtype: torch.dtype = FLOAT32) -> torch.Tensor:
    """Whole numbers, whose sums are exact in any order."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@emulated
@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "padding", "n"),
    [
        (3, (3, 3), 1, 1, 128),
        (4, (3, 3), 1, 1, 136),  # a second block of columns; 36 columns of the weight
        (7, (3, 3), 1, (1, 0, 2, 1), 24),
        (1, (5, 2), 2, (0, 1, 1, 0), 8),
        (3, (1, 2), 3, 0, 40),
    ],
)
def test_sums_are_exact(instructions: str, channels: int, kernel, stride: int, padding, n: int) -> None:  # noqa: F811
    """All types, images whose positions lie apart, tails of positions and of columns, residual and relu."""
    for dtype, precision, out_dtype in (
        (FLOAT32, BFLOAT16, BFLOAT16),
        (BFLOAT16, BFLOAT16, FLOAT32),
        (FLOAT16, FLOAT16, FLOAT16),
    ):
        memory = torch.full((2, 9, 13, channels + 2), float("nan"), dtype=dtype)
        x = memory[..., 1 : channels + 1].copy_(whole(2, 9, 13, channels, dtype=dtype))
        weight = PackedWeight.pack(whole(1, n, kernel[0] * kernel[1] * channels), precision)
        options = {"kernel": kernel, "stride": stride, "padding": padding, "out_dtype": out_dtype}
        expected = ops.conv2d(x, weight, whole(n), impl="reference", **options)
        assert torch.equal(ops.conv2d(x, weight, whole(n), impl="cuda_rows", **options), expected)
        options |= {"residual": whole(*expected.shape, dtype=out_dtype), "activation": "relu"}
        found = [ops.conv2d(x, weight, None, impl=impl, **options) for impl in ("cuda_rows", "reference")]
        assert torch.equal(*found)


@pytest.mark.parametrize("instructions", ["wgmma"], indirect=True)
def test_a_result_that_is_not_aligned(instructions: str) -> None:  # noqa: F811
    x, weight = whole(1, 4, 5, 3), PackedWeight.pack(whole(1, 8, 27), BFLOAT16)
    out = torch.zeros(1, 4, 5, 11)[..., 2:10]
    options = {"kernel": (3, 3), "padding": 1}
    ops.conv2d(x, weight, out=out, impl="cuda_rows", **options)
    assert torch.equal(out, ops.conv2d(x, weight, impl="reference", **options))


@pytest.mark.parametrize("instructions", ["wgmma"], indirect=True)
@pytest.mark.parametrize("run", [64, 128, 256, 32, 48])
@pytest.mark.parametrize("precision", [BFLOAT16, FLOAT16])
def test_statistics(instructions: str, run: int, precision: torch.dtype, monkeypatch) -> None:  # noqa: F811
    """Of runs of whole tiles they are found on the way; images far from zero, and channels that do not vary."""
    searched = []
    monkeypatch.setattr(
        _narrow_cuda, "partial", lambda *args, original=_narrow_cuda.partial: searched.append(run) or original(*args)
    )
    x, numbers = randn(2, 16, 16, 3) + 100, randn(1, 40, 27)
    numbers[:, 5] = 0
    weight, bias = PackedWeight.pack(numbers, precision), randn(40)
    found = []
    for impl in ("cuda_rows", "reference"):
        known = Statistics(torch.full((2, -(-256 // run), 5, 40), torch.nan), run)
        out = ops.conv2d(x, weight, bias, kernel=(3, 3), padding=1, out_dtype=FLOAT32, statistics=known, impl=impl)
        found.append((out, known.data))
    assert bool(searched) == (run in (32, 48))
    expected = Statistics(torch.empty_like(found[0][1]), run)
    ops.statistics.fill_statistics(found[0][0].flatten(1, 2), expected.data, run)
    mean, rest, squares = found[0][1].double().unbind(2)[:3]
    exact = expected.data.double()
    assert torch.equal(found[0][1][:, :, 3:], expected.data[:, :, 3:])
    assert not squares[..., 5].any()
    torch.testing.assert_close(squares, exact[:, :, 2], rtol=1e-5, atol=0)
    # About the first number of a run, whose distance from the mean is a few deviations.
    error = (mean + rest) - (exact[:, :, 0] + exact[:, :, 1])
    assert (error.abs() <= 2.0**-20 * (exact[:, :, 2] / run).sqrt() * 8).all()


@pytest.mark.parametrize("instructions", ["wgmma"], indirect=True)
def test_numbers_that_are_not_finite(instructions: str) -> None:  # noqa: F811
    """They reach the positions that read them, and make the statistics of their run NaN."""
    x, weight = whole(1, 16, 16, 3), PackedWeight.pack(whole(1, 8, 27).abs() + 1, BFLOAT16)
    x[0, 0, 0, 1], x[0, 12, 3, 0] = float("inf"), float("nan")
    known = Statistics(torch.zeros(1, 4, 5, 8), 64)
    options = {"kernel": (3, 3), "padding": 1}
    out = ops.conv2d(x, weight, statistics=known, impl="cuda_rows", **options)
    assert torch.equal(out.isnan(), ops.conv2d(x, weight, impl="reference", **options).isnan())
    assert known.data[0, :, 2].isfinite().all(-1).tolist() == [False, True, False, False]


def test_orders_of_threads_do_not_change_a_bit(cuda, monkeypatch) -> None:
    """Walks of several tiles with statistics, on a device with few processors."""
    monkeypatch.setattr(_narrow_cuda._gemm_cuda._native, "load", lambda name: {"_C_cuda": cuda}[name])
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": 0}))
    cuda.announce([(0, 2**63, True)])
    x, weight, found = randn(3, 32, 32, 3), make_weight(48, 27, BFLOAT16), []
    for order in range(4):
        cuda.configure(1, 9, 227 << 10, order)
        known = torch.full((3, 8, 5, 48), torch.nan)
        call = registry()["conv2d"].bind(
            x, weight, randn(48), kernel=(3, 3), padding=1, statistics=Statistics(known, 128), out_dtype=BFLOAT16
        )
        _narrow_cuda.forward(call)
        found.append((call.out.clone(), known))
    assert found[0][1].isfinite().all()
    for out, known in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(known, found[0][1])


def bind(channels: int = 3, precision: torch.dtype = BFLOAT16, n: int = 24, **options: object) -> object:
    kernel = options.pop("kernel", (3, 3))
    weight = make_weight(n, kernel[0] * kernel[1] * channels, precision)
    return registry()["conv2d"].bind(randn(1, 4, 4, channels), weight, kernel=kernel, **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"channels": 4, "padding": 1}, True),
        ({"channels": 8}, False),  # which other kernels copy
        ({"channels": 9}, False),  # more than 64 columns
        ({"precision": torch.int8}, False),
        ({"precision": FLOAT16, "out_dtype": BFLOAT16}, False),
        ({"silu": True}, False),
        ({"activation": "silu"}, False),
        ({"n": 20}, False),
        ({"kernel": (1, 1)}, False),
    ],
)
def test_which_convolutions_read_few_numbers(options: dict, expected: bool) -> None:
    assert _narrow_cuda.fits(bind(**options)) is expected
