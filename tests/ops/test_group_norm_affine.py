"""group_norm_affine against GroupNorm in float64, for every implementation and instruction set level."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from torch import Tensor
from torch.nn.functional import group_norm

from vpd_fast.errors import InputError
from vpd_fast.ops._layout import rows_contiguous
from vpd_fast.ops.statistics import Statistics, fill_statistics, run_length, statistics_shape

from .on_device import ops
from .variants import INTERPRETED, variants

UNIT_ROUNDOFF = 2.0**-24


def make_x(*shape: int, seed: int = 0, mean: float = 0.5, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * (1 + torch.rand(shape[-1], generator=generator))
    return (x + mean).to(dtype)


def make_affine(channels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels)
    return tuple(torch.randn(channels, generator=generator) for _ in range(2))


def oracle(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, x2: Tensor | None = None) -> Tensor:
    """Scale and shift in float64, from the definition of GroupNorm."""
    x = x.double() if x2 is None else torch.cat([x.double(), x2.double()], -1)
    batch, channels = x.shape[0], x.shape[-1]
    values = x.permute(0, 3, 1, 2).reshape(batch, groups, -1)
    mean = values.mean(2)
    rstd = ((values - mean[:, :, None]).square().mean(2) + eps).rsqrt()
    mean, rstd = (t.repeat_interleave(channels // groups, 1) for t in (mean, rstd))
    scale = weight.double() * rstd
    return torch.stack([scale, bias.double() - mean * scale], 1)


def assert_affine(
    actual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    x2: Tensor | None = None,
    roundings: int = 6,
) -> None:
    """Each number within what float32 sums over blocks of 64 rows and one final rounding explain.

    A float32 sum of 64 terms is off by at most 66 roundings of the sum of their magnitudes; these roundings
    have random signs, so sqrt(64) = 8 of them is what thousands of blocks show at the very most. The sum of squares
    is about a value that makes it up to 9 times as large (csrc/cpu/group_norm_affine.cpp), typically 1 + 1/8 times;
    the root halves the error: 8 * 1.125 / 2 = 4.5, and one more for the store. The shift has the error of the scale
    times the mean, and that of the mean, at most 8 roundings of the mean deviation, times the scale.

    roundings: of the scale, where the signs are not random.
    """
    exact = oracle(x, weight, bias, groups, eps, x2)
    assert actual.dtype == torch.float32
    assert actual.shape == exact.shape
    assert actual.isfinite().all()
    scale, shift = exact.unbind(1)
    scale_budget = roundings * UNIT_ROUNDOFF * scale.abs()
    offset = (bias.double() - shift).abs()  # |mean * scale|
    shift_budget = UNIT_ROUNDOFF * (shift.abs() + roundings * offset + 8 * weight.double().abs())
    assert ((actual[:, 0] - scale).abs() <= scale_budget).all()
    assert ((actual[:, 1] - shift).abs() <= shift_budget).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 1, 1, 1), 1),
        ((1, 1, 1, 6), 2),
        ((2, 1, 7, 15), 5),
        ((1, 8, 1, 16), 4),
        ((2, 3, 3, 17), 17),
        ((1, 9, 7, 33), 1),
        ((3, 8, 8, 64), 32),
        ((1, 5, 13, 96), 32),
        ((1, 11, 12, 40), 8),  # more rows than a chunk
        ((2, 16, 33, 320), 32),
        ((1, 95, 96, 8), 4),  # more rows than 64 chunks of 128
    ],
)
def test_shapes(impl: str, shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> None:
    x, (weight, bias) = make_x(*shape, dtype=dtype), make_affine(shape[-1])
    assert_affine(ops.group_norm_affine(x, weight, bias, groups, 1e-5, impl=impl), x, weight, bias, groups, 1e-5)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize(("channels", "groups"), [((640, 320), 32), ((20, 12), 8), ((1, 15), 4), ((17, 31), 3)])
def test_two_sources_whose_groups_straddle(impl: str, channels: tuple[int, int], groups: int, dtypes: tuple) -> None:
    batch = 1 if impl == "triton" else 2  # the interpreter takes as long for each group of each image
    for first, second in {dtypes, dtypes[::-1]}:
        x = make_x(batch, 9, 15, channels[0], dtype=first)
        x2 = make_x(batch, 9, 15, channels[1], seed=1, mean=-3, dtype=second)
        weight, bias = make_affine(sum(channels))
        actual = ops.group_norm_affine(x, weight, bias, groups, 1e-6, x2, impl=impl)
        assert_affine(actual, x, weight, bias, groups, 1e-6, x2)


def test_it_is_group_norm(impl: str) -> None:
    x, (weight, bias) = make_x(2, 8, 9, 64), make_affine(64)
    scale, shift = ops.group_norm_affine(x, weight, bias, 32, 1e-5, impl=impl)[:, :, None, None].unbind(1)
    expected = group_norm(x.permute(0, 3, 1, 2), 32, weight, bias, 1e-5).permute(0, 2, 3, 1)
    # Both are within a few roundings of numbers below 20.
    torch.testing.assert_close(x * scale + shift, expected, rtol=0, atol=20 * 8 * UNIT_ROUNDOFF)


@pytest.mark.parametrize("mean", [1e2, -1e4, 1e6])
def test_a_mean_far_from_zero_costs_nothing(impl: str, mean: float) -> None:
    """Differences of float32 squares would be off by (mean / deviation)^2 roundings: all digits from 4096 on."""
    x, (weight, bias) = make_x(1, 20, 21, 32, mean=mean), make_affine(32)
    assert_affine(ops.group_norm_affine(x, weight, bias, 8, 1e-6, impl=impl), x, weight, bias, 8, 1e-6)


@pytest.mark.parametrize("row", [0, 7, 64, 300])
def test_outliers_wherever_they_are(impl: str, row: int) -> None:
    """The value that sums are taken about is made of the first rows; an outlier there must do no harm.

    It moves the origin by an eighth of itself, so that the squares of the 63 rows without it are all alike, and so are
    the signs of their roundings: up to 66 of a sum 1.8 times as large as needed, of which the root leaves half.
    """
    x, (weight, bias) = make_x(1, 20, 21, 32), make_affine(32)
    x.view(420, 32)[row, ::4] = 1e4
    actual = ops.group_norm_affine(x, weight, bias, 8, 1e-6, impl=impl)
    assert_affine(actual, x, weight, bias, 8, 1e-6, roundings=60)


def test_constant_input_gives_exactly_the_eps(impl: str) -> None:
    x, (weight, bias) = torch.full((1, 10, 20, 8), 0.7), make_affine(8)
    scale, shift = ops.group_norm_affine(x, weight, bias, 2, 1e-5, impl=impl)[0]
    # Not every implementation finds the mean exactly, but to half a rounding, which is nothing compared to sqrt(eps).
    assert torch.allclose(scale.double(), weight.double() * 1e-5**-0.5, rtol=2 * UNIT_ROUNDOFF, atol=0)
    assert torch.allclose((0.7 * scale + shift).double(), bias.double(), rtol=0, atol=1e3 * 4 * UNIT_ROUNDOFF)


def test_a_trend_along_the_rows(impl: str) -> None:
    """Every block has another mean: what merging adds is nearly all of the variance."""
    x = make_x(1, 30, 30, 16) + torch.arange(900.0).view(1, 30, 30, 1)
    weight, bias = make_affine(16)
    assert_affine(ops.group_norm_affine(x, weight, bias, 4, 1e-6, impl=impl), x, weight, bias, 4, 1e-6)


def strided_variants() -> dict[str, Tensor]:
    x = make_x(2, 6, 7, 19)
    wide = torch.full((2, 6, 7, 40), float("nan"))
    wide[..., 3:22] = x
    every_second = torch.full((2, 12, 14, 38), float("nan"))
    every_second[:, ::2, ::2, ::2] = x
    return {
        "slice of more channels": wide[..., 3:22],
        "channels first": x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "every second element": every_second[:, ::2, ::2, ::2],
        "columns first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "one image for all": x[:1].expand(3, -1, -1, -1),
        "one channel for all": x[..., :1].expand(-1, -1, -1, 19),
        "offset": torch.cat([x, x])[1:3],
    }


@pytest.mark.parametrize("layout", list(strided_variants()))
def test_strides_do_not_matter(impl: str, layout: str) -> None:
    groups = 1 if impl == "triton" else 19  # the interpreter takes as long for each of them
    x, (weight, bias) = strided_variants()[layout], make_affine(38)
    actual = ops.group_norm_affine(x, weight[::2], bias[::2], groups, 1e-5, impl=impl)
    expected = ops.group_norm_affine(
        x.contiguous(), weight[::2].contiguous(), bias[::2].contiguous(), groups, 1e-5, impl=impl
    )
    assert torch.equal(actual, expected)
    twice = ops.group_norm_affine(x, weight, bias, groups, 1e-5, x, impl=impl)
    joined = ops.group_norm_affine(torch.cat([x, x], -1), weight, bias, groups, 1e-5, impl=impl)
    assert torch.equal(twice, joined)


def test_evenly_spaced_rows_are_read_in_place() -> None:
    for layout in ("slice of more channels", "offset", "one image for all"):
        x = strided_variants()[layout]
        assert rows_contiguous(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("row", [0, 50, 130])
def test_what_is_not_finite_spoils_its_group_and_no_other(impl: str, special: float, row: int) -> None:
    x, (weight, bias) = make_x(2, 12, 13, 24), make_affine(24)
    expected = ops.group_norm_affine(x, weight, bias, 6, 1e-5, impl=impl)
    x.view(2, 156, 24)[1, row, 9] = special
    actual = ops.group_norm_affine(x, weight, bias, 6, 1e-5, impl=impl)
    spoilt = torch.zeros(2, 2, 24, dtype=torch.bool)
    spoilt[1, :, 8:12] = True
    assert actual[spoilt].isnan().all()
    assert torch.equal(actual[~spoilt], expected[~spoilt])


def test_empty_batch(impl: str) -> None:
    weight, bias = make_affine(8)
    assert ops.group_norm_affine(torch.zeros(0, 4, 4, 8), weight, bias, 2, 1e-5, impl=impl).shape == (0, 2, 8)


def test_threads_and_repetition_do_not_change_a_bit(isa: str) -> None:
    x, (weight, bias) = make_x(3, 33, 17, 24), make_affine(24)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.group_norm_affine(x, weight, bias, 6, 1e-5, impl="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_nothing_beyond_its_channels(isa: str, dtype: torch.dtype) -> None:
    """The memory ends with the last channel of the last row; behind it there is nothing to read."""
    rows, channels = 11, 21
    count = rows * channels
    pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    raw = torch.frombuffer(pages, dtype=torch.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    guard = ctypes.c_void_p(raw.data_ptr() + mmap.PAGESIZE)
    assert libc.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    size = count * dtype.itemsize
    x = raw[mmap.PAGESIZE - size : mmap.PAGESIZE].view(dtype).view(1, rows, 1, channels)
    x.copy_(make_x(1, rows, 1, channels))
    weight, bias = make_affine(channels)
    actual = ops.group_norm_affine(x, weight, bias, 3, 1e-5, impl="cpu")
    assert torch.equal(actual, ops.group_norm_affine(x.clone(), weight, bias, 3, 1e-5, impl="cpu"))


GOOD = {
    "x": torch.zeros(1, 4, 4, 8),
    "weight": torch.zeros(8),
    "bias": torch.zeros(8),
    "groups": 2,
    "eps": 1e-5,
    "x2": None,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 4, 8)}, r"x must have shape \(B, H, W, C1\), got \(4, 4, 8\)"),
        ({"x": torch.zeros(1, 0, 4, 8)}, "x has no elements along H"),
        (
            {"x": torch.zeros(1, 4, 4, 8).double()},
            "x must be torch.float32 or torch.bfloat16 or torch.float16, got torch.float64",
        ),
        ({"x": None}, "x must be a tensor .* got NoneType"),
        ({"x2": torch.zeros(1, 4, 5, 8)}, r"x2 must have shape \(B=1, H=4, W=4, C2\), got \(1, 4, 5, 8\)"),
        ({"x2": torch.zeros(1, 4, 4, 8)}, r"weight must have shape \(C=16\), got \(8,\)"),
        ({"x2": torch.zeros(1, 4, 4, 8, device="meta"), "weight": torch.zeros(16), "bias": torch.zeros(16)}, "x2 must"),
        ({"weight": torch.zeros(4)}, r"weight must have shape \(C=8\), got \(4,\)"),
        ({"weight": torch.zeros(8, device="meta")}, "weight must be on cpu as x is, got meta"),
        ({"bias": torch.zeros(8).bfloat16()}, "bias must be torch.float32, got torch.bfloat16"),
        ({"bias": None}, "bias must be a tensor .* got NoneType"),
        ({"groups": 3}, "groups must divide the 8 channels, got 3"),
        ({"groups": 0}, "groups must be a positive integer, got 0"),
        ({"groups": 2.0}, "groups must be a positive integer, got 2.0"),
        ({"eps": -1.0}, "eps must be a finite number that is not negative, got -1.0"),
        ({"eps": float("nan")}, "eps must be .* got nan"),
        ({"weight": torch.zeros(8, requires_grad=True)}, "weight requires gradients"),
        ({"x": torch.zeros(1, 4, 4, 8, requires_grad=True)}, "x requires gradients"),
        ({"impl": "cuda"}, "impl must be 'auto' or an implementation .* got 'cuda'"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ops.group_norm_affine(**{**GOOD, **change})


def test_parameters_are_fine_where_no_gradients_are_recorded() -> None:
    weight = torch.ones(8, requires_grad=True)
    with torch.no_grad():
        assert not ops.group_norm_affine(**{**GOOD, "weight": weight}).requires_grad


def test_the_kernel_says_why_it_cannot_run() -> None:
    on_meta = {name: t.to("meta") if isinstance(t, Tensor) else t for name, t in GOOD.items()}
    assert ops.explain("group_norm_affine", **on_meta) == {
        "cpu": "x is on meta, not on the CPU",
        "triton": "x is on meta, not on a GPU",
        "reference": "ok",
    }


def test_opcheck() -> None:
    x, x2, (weight, bias) = make_x(2, 5, 6, 8), make_x(2, 5, 6, 4, dtype=torch.bfloat16), make_affine(12)
    for name in ("auto", "cpu", "reference"):
        ranges = torch.zeros(2, 2, 3) if name == "reference" else None
        arguments = (x, weight, bias, 3, 1e-5, x2, None, 1, None, 1, ranges, True, None, name)
        torch.library.opcheck(torch.ops.vpd_fast.group_norm_affine.default, arguments)


def test_torch_compile_through_the_public_function() -> None:
    def normalise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        scale, shift = ops.group_norm_affine(x * 2, weight, bias, 4, 1e-5)[:, :, None, None].unbind(1)
        return x * 2 * scale + shift

    compiled = torch.compile(normalise, fullgraph=True, backend="aot_eager", dynamic=True)
    weight, bias = make_affine(12)
    for size in (4, 6):
        x = make_x(1, size, size + 1, 12)
        assert torch.equal(compiled(x, weight, bias), normalise(x, weight, bias))


WITHOUT_NATIVE = pytest.mark.parametrize("name", ["reference", *variants(["triton"], INTERPRETED)])


# --- statistics that are known, and where the next layer's numbers will be -------------------------------------------


def known(x: Tensor) -> Statistics:
    data = torch.empty(statistics_shape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3]))
    statistics = Statistics(data, run_length(x.shape[1] * x.shape[2]))
    fill_statistics(x.flatten(1, 2), *statistics)
    return statistics


@WITHOUT_NATIVE
@pytest.mark.parametrize("shape", [(2, 8, 8, 12), (1, 5, 7, 40), (1, 64, 20, 8)])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False, None])
def test_known_statistics(name: str, shape: tuple[int, ...], first: bool, second: bool | None) -> None:
    """Of both sources, of one, or of none; what is known is not read."""
    x, x2 = make_x(*shape, mean=3), None if second is None else make_x(*shape[:3], 4, seed=1, dtype=torch.bfloat16)
    weight, bias = make_affine(shape[3] + (0 if x2 is None else 4))
    options = {"statistics": known(x) if first else None, "statistics2": known(x2) if second else None}
    blind = torch.full_like(x, torch.nan) if first else x
    blind2 = torch.full_like(x2, torch.nan) if second else x2
    actual = ops.group_norm_affine(blind, weight, bias, 4, 1e-5, blind2, impl=name, **options)
    assert_affine(actual, x, weight, bias, 4, 1e-5, x2)


@WITHOUT_NATIVE
def test_runs_of_different_lengths(name: str) -> None:
    x, x2, (weight, bias) = make_x(1, 8, 16, 6), make_x(1, 8, 16, 6, seed=1), make_affine(12)
    data = torch.empty(1, 8, 5, 6)
    fill_statistics(x2.flatten(1, 2), data, 16)
    options = {"statistics": known(x), "statistics2": Statistics(data, 16)}
    actual = ops.group_norm_affine(x, weight, bias, 3, 1e-5, x2, impl=name, **options)
    assert_affine(actual, x, weight, bias, 3, 1e-5, x2)


@WITHOUT_NATIVE
@pytest.mark.parametrize("first", [0.0, 1e6])
def test_more_runs_than_are_on_their_way_at_once(name: str, first: float) -> None:
    """1125 runs of a group of four channels. Sums are about the first run's mean, which may be far from the others."""
    x, (weight, bias) = make_x(1, 45, 50, 8, mean=1e3), make_affine(8)
    x[0, 0, :2] += first
    data = torch.empty(1, 1125, 5, 8)
    fill_statistics(x.flatten(1, 2), data, 2)
    blind, ranges = torch.full_like(x, torch.nan), torch.zeros(1, 2, 2)
    known = {"statistics": Statistics(data, 2), "ranges": ranges}
    assert_affine(ops.group_norm_affine(blind, weight, bias, 2, 1e-5, impl=name, **known), x, weight, bias, 2, 1e-5)
    assert ranges.isfinite().all()


@WITHOUT_NATIVE
@pytest.mark.parametrize("with_scale", [True, False])
@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("mean", [0.0, 30.0, -30.0])
def test_ranges(name: str, mean: float, activation: bool, with_scale: bool) -> None:
    """Bounds that are reached but for the least of SiLU, which may lie between two numbers."""
    x, (weight, bias) = make_x(2, 9, 8, 24), make_affine(24)
    bias = bias + mean
    scale = torch.linspace(-1, 2, 24) if with_scale else None
    ranges = torch.full((2, 2, 4), torch.nan)
    affine = ops.group_norm_affine(x, weight, bias, 4, 1e-5, ranges=ranges, silu=activation, scale=scale, impl=name)
    a = x * affine[:, 0, None, None] + affine[:, 1, None, None]
    a = torch.nn.functional.silu(a) if activation else a
    a = a if scale is None else a * scale
    by_group = a.unflatten(3, (4, 6)).permute(0, 3, 1, 2, 4).flatten(2)
    rounding = 8 * UNIT_ROUNDOFF * by_group.abs().amax(2)
    assert (ranges[:, 0] <= by_group.amin(2) + rounding).all()
    assert (ranges[:, 1] >= by_group.amax(2) - rounding).all()
    # 72 numbers of a channel come this close to where SiLU is least: it is flat there.
    slack = rounding + (0.02 * (1 if scale is None else 2) if activation else 0)
    assert (ranges[:, 0] >= by_group.amin(2) - slack).all()
    assert (ranges[:, 1] <= by_group.amax(2) + slack).all()


@WITHOUT_NATIVE
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_ranges_of_what_is_not_finite(name: str, special: float) -> None:
    x, (weight, bias) = make_x(2, 4, 4, 8), make_affine(8)
    x[1, 2, 1, 3] = special
    ranges = torch.zeros(2, 2, 4)
    ops.group_norm_affine(x, weight, bias, 4, 1e-5, ranges=ranges, silu=True, impl=name)
    expected = torch.zeros(2, 2, 4, dtype=torch.bool)
    expected[1, :, 1] = True
    assert torch.equal(ranges.isnan(), expected)


def test_native_kernels_take_none() -> None:
    x, (weight, bias) = make_x(1, 8, 8, 8), make_affine(8)
    with pytest.raises(InputError, match="statistics and ranges are for kernels that round whole images"):
        ops.group_norm_affine(x, weight, bias, 4, 1e-5, statistics=known(x), impl="cpu")
