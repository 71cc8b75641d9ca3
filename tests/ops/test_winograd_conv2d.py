"""winograd_conv2d against float64 convolution and its reference, for every instruction set level and precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast import ops
from vpd_fast.ops.packing import PackedWeight
from vpd_fast.ops.winograd_conv2d import _INPUT, _OUTPUT, _WEIGHT, STEPS

from .winograd_cases import PRECISIONS, TAPS, check, error, everything, make_problem

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = [  # of x, then output channels
    ((1, 1, 1, 1), 1),
    ((2, 1, 5, 3), 7),
    ((1, 6, 1, 16), 16),
    ((3, 5, 11, 33), 40),
    ((1, 8, 8, 32), 32),
    ((2, 7, 9, 20), 65),
    ((1, 16, 16, 64), 96),
    ((1, 37, 35, 16), 24),  # several blocks and strips, and incomplete tiles
    ((5, 4, 4, 48), 31),  # blocks of several images
]


@pytest.mark.parametrize("taps", TAPS)
def test_transforms_are_those_of_a_convolution(taps: int) -> None:
    """In one dimension and float64: each output is a sum of three neighbours, which may be one pixel doubled."""
    inward, weight, outward = (torch.tensor(table[taps], dtype=torch.float64) for table in (_INPUT, _WEIGHT, _OUTPUT))
    pixels, kernel = torch.randn(inward.shape[1], dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    seen = pixels[[0, 1, 1, 2]] if taps == 9 else pixels
    expected = F.conv1d(seen[None, None], kernel[None, None])[0, 0]
    # Three sums of up to 3, 6 and 6 products, of table entries that are rounded, and the convolution's own of 3: each
    # term is rounded less than 24 times.
    terms = outward.abs() @ ((weight.abs() @ kernel.abs()) * (inward.abs() @ pixels.abs()))
    assert ((outward @ ((weight @ kernel) * (inward @ pixels)) - expected).abs() <= 24 * 2.0**-53 * terms).all()


@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_transformed_weight_is_rounded_once(taps: int, dtype: torch.dtype) -> None:
    kernel = torch.randn(5, 4, 3, 3).to(dtype)
    transform = torch.tensor(_WEIGHT[taps], dtype=torch.float64)
    expected = transform @ kernel.double() @ transform.T  # (5, 4, side, side)
    actual = ops.winograd_weight(kernel, taps)
    assert actual.dtype == torch.float32
    exact = expected.flatten(2).permute(2, 0, 1)
    assert ((actual - exact).abs() <= 2.0**-24 * exact.abs() + 1e-15).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize(("shape", "n"), SHAPES)
def test_shapes(isa: str, shape: tuple, n: int, taps: int, precision: torch.dtype) -> None:
    check(make_problem(shape, n, taps, precision))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("taps", TAPS)
def test_everything_around_the_convolution(isa: str, taps: int, precision: torch.dtype, dtype: torch.dtype) -> None:
    problem = make_problem((2, 9, 10, 37), 45, taps, precision, dtype)
    options = everything(problem)
    for activation in (None, "relu", "silu"):
        check(problem.using(**options, activation=activation))
    for name in ("bias", "affine", "scale", "residual"):  # each alone
        check(problem.using(**{name: options[name]}))
    check(problem.using(silu=True, activation="relu"))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_dtypes(isa: str, dtype: torch.dtype, precision: torch.dtype) -> None:
    """x2 is float32, and so are in turn the residual and the result."""
    problem = make_problem((1, 6, 7, 16), 32, 16, precision, dtype, c2=16)
    residual = torch.randn(1, 6, 7, 32)
    for residual_dtype in DTYPES:
        for out_dtype in DTYPES:
            check(problem.using(residual=residual.to(residual_dtype), out_dtype=out_dtype))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("channels", [(16, 32), (17, 15), (5, 40), (31, 1), (1, 31)])
def test_two_sources_are_one_of_all_channels(isa: str, channels: tuple, taps: int, precision: torch.dtype) -> None:
    problem = make_problem((2, 5, 6, channels[0]), 24, taps, precision, c2=channels[1])
    problem = problem.using(**everything(problem))
    check(problem)
    joined = make_problem((2, 5, 6, sum(channels)), 24, taps, precision)
    joined.x, joined.kernel = torch.cat([problem.x, problem.options["x2"]], -1), problem.kernel
    joined.options = problem.options | {"x2": None}
    assert torch.equal(problem.run(), joined.run())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_large_sums(isa: str, precision: torch.dtype) -> None:
    """2560 channels, the most there are, of the largest 8-bit numbers, all of one sign: 8e7 in int32."""
    problem = make_problem((1, 4, 4, 2560), 8, 16, precision)
    problem.x, problem.kernel = torch.full_like(problem.x, 3.0), torch.full_like(problem.kernel, 0.5)
    actual, exact = problem.run(), problem.exact()
    # All numbers are equal up to powers of two before they are rounded, which is then exact for bfloat16; for 8 bits
    # each factor is the largest or zero. Sums of 2560 float32 may be off by 2560 roundings.
    torch.testing.assert_close(actual.double(), exact, rtol=2560 * 2.0**-24, atol=0)


def test_empty_batch(isa: str) -> None:
    assert make_problem((0, 4, 6, 8), 5, 16).run().shape == (0, 4, 6, 5)
    assert make_problem((0, 4, 6, 8), 5, 9).run().shape == (0, 8, 12, 5)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("taps", TAPS)
def test_zeros_give_the_bias_exactly(isa: str, taps: int, precision: torch.dtype) -> None:
    problem = make_problem((1, 9, 9, 20), 18, taps, precision)
    problem.x.zero_()
    bias = torch.randn(18)
    assert torch.equal(problem.using(bias=bias).run(), bias.expand_as(problem.run()))


def test_tiles_of_8_bits_have_their_own_scales(isa: str) -> None:
    """One half of the image is a million times smaller, and as exact as the other."""
    problem = make_problem((1, 8, 16, 32), 16, 16, torch.int8)
    problem.x[:, :, 8:] *= 1e-6
    actual, exact = problem.run(), problem.exact()
    small, large = slice(10, 16), slice(0, 6)  # tiles that reach into both halves are as coarse as the larger one
    assert error(actual[:, :, small], exact[:, :, small]) <= 2 * error(actual[:, :, large], exact[:, :, large])


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("taps", TAPS)
def test_what_is_not_finite_spoils_its_tiles(isa: str, taps: int, precision: torch.dtype, special: float) -> None:
    problem = make_problem((2, 13, 12, 24), 20, taps, precision)
    expected = problem.run()
    problem.x[1, 6, 5, 11] = special
    actual = problem.run()
    touched = ~problem.exact().isfinite()
    spoilt = ~actual.isfinite()
    assert spoilt[touched].all()
    assert precision != torch.int8 or actual[spoilt].isnan().all()
    assert torch.equal(actual[~spoilt], expected[~spoilt])
    # At most the tiles that read the pixel: one or two per dimension.
    side = 2 * (4 if taps == 36 else 2) + (2 if taps == 9 else 0)
    assert not spoilt[0].any()
    assert spoilt[1].any(-1).sum() <= side**2


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("shape", [(1, 9, 11, 16), (3, 40, 70, 16)])  # few blocks, many blocks
def test_threads_do_not_change_a_bit(isa: str, shape: tuple, taps: int, precision: torch.dtype) -> None:
    problem = make_problem(shape, 70, taps, precision)
    problem = problem.using(**everything(problem))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2, 5, 16):
            torch.set_num_threads(threads)
            results.append(problem.run())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def operator_arguments(problem) -> tuple:
    weight = PackedWeight.pack(ops.winograd_weight(problem.kernel, problem.taps), problem.precision)
    op = ops.registry()["winograd_conv2d"]
    return tuple(op.flatten(op.bind(problem.x, weight, upsample=problem.taps == 9, **problem.options)))


@pytest.mark.parametrize("taps", STEPS)
def test_opcheck(taps: int) -> None:
    for precision in (torch.int8, torch.float32):
        problem = make_problem((2, 5, 6, 8), 9, taps, precision, torch.bfloat16, c2=4)
        problem = problem.using(**everything(problem))
        for name in ("auto", "cpu", "reference"):
            arguments = (*operator_arguments(problem), name)
            torch.library.opcheck(torch.ops.vpd_fast.winograd_conv2d.default, arguments)


def test_torch_compile_through_the_public_function() -> None:
    problem = make_problem((1, 6, 7, 8), 9, 16)
    weight = PackedWeight.pack(ops.winograd_weight(problem.kernel, 16), torch.float32)

    def convolve(x: Tensor) -> Tensor:
        return ops.winograd_conv2d(x * 2, weight, silu=True) + 1

    compiled = torch.compile(convolve, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (6, 9):
        x = torch.randn(1, size, size + 1, 8)
        assert torch.equal(compiled(x), convolve(x))
