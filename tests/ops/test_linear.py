"""linear against float64, for every implementation, instruction set level and precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from vpd_fast.ops.packing import PackedWeight
from vpd_fast.ops.statistics import Statistics, statistics_shape

from ..helpers.sparse import untouched
from .gemm_cases import (
    DTYPES,
    ONE_PRECISION,
    PRECISIONS,
    WITHIN_ROUNDING,
    assert_close,
    assert_same_as_reference,
    complete,
    make_weight,
    randn,
)
from .on_device import ops
from .variants import computed_on_gpu


def rows_of(
    x: Tensor,
    x2: Tensor | None,
    norm: str | None,
    affine: Tensor | None,
    scale: Tensor | None,
    dtype: torch.dtype,
    eps: float = 1e-5,
) -> Tensor:
    """What the prologue makes, in `dtype`."""
    a = x.to(dtype) if x2 is None else torch.cat([x.to(dtype), x2.to(dtype)], -1)
    a = layer_norm(a, a.shape[-1:], eps=eps) if norm else a
    a = a if affine is None else a * affine[:, :1].to(dtype) + affine[:, 1:].to(dtype)
    return a if scale is None else a * scale.to(dtype)


def check(
    impl: str,
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    exact_rows: bool = False,
    **prologue: Tensor | str | None,
) -> Tensor:
    """Runs linear and holds the result to float64, or for 8 bits to the reference, which is held to the rounding."""
    options = dict(activation=activation, residual=residual, out_dtype=out_dtype, **prologue)
    actual = ops.linear(x, weight, bias, impl=impl, **options)
    assert actual.dtype == (out_dtype or x.dtype)
    prologue = {name: prologue.get(name) for name in ("x2", "norm", "affine", "scale")}
    exact_a = rows_of(x, **prologue, dtype=torch.float64)
    if weight.dtype.itemsize == 1:
        plain = ops.linear(x, weight, bias, out_dtype=torch.float32, impl=impl, **prologue)
        few_bits = computed_on_gpu(impl)
        WITHIN_ROUNDING[weight.dtype](plain, exact_a, weight, bias, few_bits=few_bits)
        reference = ops.linear(x, weight, bias, impl="reference", **options)
        assert_same_as_reference(actual, reference, weight, exact_rows, few_bits)
        return actual
    same_a = rows_of(x, **prologue, dtype=torch.float32).to(weight.dtype).float()
    rest = weight, bias, activation, residual
    assert_close(actual, complete(same_a, *rest), complete(exact_a, *rest), weight.k, options.keys())
    return actual


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("k", [3, 48, 790, 1430])
def test_columns_that_are_not_aligned(impl: str, k: int, precision: torch.dtype) -> None:
    """Of features with maps: rows that begin anywhere, also in a larger tensor."""
    wide = randn(1, 9, k + 3, dtype=torch.bfloat16)
    weight, bias = make_weight(5, k, precision), randn(5)
    for x in (wide[..., :k], wide[..., 3:]):
        check(impl, x, weight, bias)


SIZES = [  # rows, k, n
    (1, 1, 1),
    (3, 2, 5),
    (5, 3, 16),
    (12, 5, 17),
    (13, 15, 31),
    (24, 16, 32),
    (25, 17, 33),
    (97, 40, 48),
    (193, 33, 100),
    (7, 320, 64),
    (400, 31, 70),
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_sizes(impl: str, m: int, k: int, n: int, precision: torch.dtype) -> None:
    x, bias = randn(2, m, k), randn(n)
    check(impl, x, make_weight(n, k, precision), bias, exact_rows=True)
    check(impl, x, make_weight(n, k, precision), exact_rows=True)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("k", [1023, 1025, 2100, 4100, 8200])
def test_long_sums_are_taken_in_pieces(impl: str, k: int, precision: torch.dtype) -> None:
    check(impl, randn(1, 26, k), make_weight(40, k, precision), randn(40), exact_rows=True)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("x2_dtype", [None, *DTYPES])
@pytest.mark.parametrize("out_dtype", [None, *DTYPES])
def test_dtypes(impl: str, x_dtype, x2_dtype, out_dtype, precision) -> None:
    x, k = randn(2, 19, 23, dtype=x_dtype), 23 if x2_dtype is None else 64
    x2 = None if x2_dtype is None else randn(2, 19, 41, dtype=x2_dtype)
    for residual_dtype in DTYPES:
        residual = randn(2, 19, 35, dtype=residual_dtype)
        weight = make_weight(35, k, precision)
        check(impl, x, weight, randn(35), x2=x2, residual=residual, out_dtype=out_dtype, exact_rows=True)


PROLOGUES = [
    (),
    ("norm",),
    ("affine",),
    ("scale",),
    ("norm", "scale"),
    ("affine", "scale"),
    ("norm", "affine", "scale"),
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("parts", PROLOGUES, ids="+".join)
@pytest.mark.parametrize("second", [0, 16, 21])
@pytest.mark.parametrize("first", [32, 37, 130])
def test_prologue(impl: str, first: int, second: int, parts: tuple[str, ...], precision: torch.dtype) -> None:
    """Sources whose widths are multiples of 16 and such that are not, side by side."""
    k = first + second
    whole = {"norm": "layer", "affine": 1 + 0.3 * randn(3, 2, k), "scale": 1 + randn(k).abs()}
    x, x2 = 3 + 2 * randn(3, 11, first), randn(3, 11, second) if second else None
    check(impl, x, make_weight(18, k, precision), randn(18), x2=x2, **{name: whole[name] for name in parts})


@pytest.mark.parametrize(
    ("precision", "k", "mean"),
    [
        *((torch.float32, 320, 1000), (torch.float32, 37, 1000), (torch.bfloat16, 37, 1000), (torch.int8, 37, 100)),
        *((torch.bfloat16, 48, 1000), (torch.int8, 48, 100)),
    ],
)
def test_layer_norm_of_numbers_far_from_zero(impl: str, precision: torch.dtype, k: int, mean: float) -> None:
    """The variance must not be a difference of large numbers, and the zeros that fill a row up must not be normalised
    and counted to its range.

    Numbers of about 1000 are rounded to 3e-5, a 400th of a step of 8 bits, which would move one in most rows.
    """
    check(impl, mean + randn(1, 9, k), make_weight(33, k, precision), norm="layer")


def test_eps(impl: str) -> None:
    x, weight = 1e-3 * randn(1, 5, 48), make_weight(20, 48, torch.float32)
    actual = ops.linear(x, weight, norm="layer", eps=0.5, impl=impl)
    exact, same = (rows_of(x, None, "layer", None, None, dtype, 0.5) for dtype in (torch.float64, torch.float32))
    assert_close(actual, complete(same, weight, None, None, None), complete(exact, weight, None, None, None), 48)
    zero = ops.linear(torch.zeros(1, 2, 48), weight, norm="layer", impl=impl)
    assert not zero.any()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 6, 30, 32, 34, 48, 64, 70, 96])
@pytest.mark.parametrize("activation", [None, "relu", "silu", "geglu"])
def test_activations(impl: str, activation: str | None, n: int, out_dtype, precision) -> None:
    n_out = n // 2 if activation == "geglu" else n
    residual = randn(2, 14, n_out, dtype=torch.bfloat16)
    x, weight = 4 * randn(2, 14, 40), make_weight(n, 40, precision)
    for addend in (None, residual):
        options = {"activation": activation, "residual": addend, "out_dtype": out_dtype, "exact_rows": True}
        check(impl, x, weight, randn(n), **options)


def test_geglu_is_that_of_the_plain_model(impl: str) -> None:
    """A projection to values and then gates, as in a transformer block, with its rows in the operator's order."""
    projection = torch.nn.Linear(32, 96)
    order = ops.geglu_rows(48)
    assert sorted(order.tolist()) == list(range(96))
    x = randn(1, 10, 32)
    with torch.no_grad():
        weight = PackedWeight.pack(projection.weight[order][None], torch.float32)
        actual = ops.linear(x, weight, projection.bias[order], activation="geglu", impl=impl)
        values, gates = projection(x).chunk(2, -1)
    torch.testing.assert_close(actual, values * torch.nn.functional.gelu(gates))


# --- 8 bits -----------------------------------------------------------------------------------------------------------


def test_sums_of_8_bits_are_exact(impl: str) -> None:
    """Numbers that 8 bits hold exactly, in sums far beyond what float32 could add up without rounding."""
    k = 16384
    x = torch.where(torch.arange(k) % 3 == 0, 255.0, torch.arange(k) % 251 + 0.0)[None, None].repeat(1, 3, 1)
    numbers = torch.where(torch.arange(k) % 2 == 0, 127.0, -126.0).repeat(1, 5, 1)
    numbers[0, 1:] += torch.arange(4)[:, None] % 2 - 1
    numbers[0, :, 0] = 127  # so that the weight's scale is 1
    weight = PackedWeight.pack(numbers, torch.int8)
    assert (weight.scales == 1).all()
    exact = x.double() @ numbers[0].double().T
    actual = ops.linear(x, weight, out_dtype=torch.float32, impl=impl)
    assert (actual.double() - exact).abs().max() <= 2 * 2.0**-24 * exact.abs().max()
    # And with a zero in the middle: sums that nearly cancel keep all their digits.
    shifted = ops.linear(x - 128, weight, out_dtype=torch.float32, impl=impl)
    exact = (x - 128).double() @ numbers[0].double().T
    assert (shifted.double() - exact).abs().max() <= 2 * 2.0**-24 * exact.abs().max()


@pytest.mark.parametrize("kind", ["positive", "negative", "one sign changes", "one large number", "tiny"])
@pytest.mark.parametrize("k", [70, 80])
def test_ranges_of_8_bits(impl: str, kind: str, k: int) -> None:
    x = randn(1, 20, k)
    x = {
        "positive": 5 + x.abs(),
        "negative": -5 - x.abs(),
        "one sign changes": x.abs() - 0.1,
        "one large number": x.index_fill(2, torch.tensor([3]), 1e4),
        "tiny": x * 1e-30,
    }[kind]
    check(impl, x, make_weight(33, k, torch.int8), exact_rows=True)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_zero_rows_give_the_bias(impl: str, precision: torch.dtype) -> None:
    bias = randn(40)
    for value in (0.0, -0.0, 1e-41):
        out = ops.linear(torch.full((1, 3, 24), value), make_weight(40, 24, precision), bias, impl=impl)
        assert torch.equal(out, bias.expand(1, 3, -1))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize("k", [37, 48])
def test_what_is_not_finite_stays_in_its_row(impl: str, k: int, norm: str | None, special: float, precision) -> None:
    x, weight = randn(1, 30, k), make_weight(40, k, precision)
    expected = ops.linear(x, weight, norm=norm, impl=impl)
    for column in (0, 20, k - 1):
        bad = x.clone()
        bad[0, 13, column] = special
        out = ops.linear(bad, weight, norm=norm, impl=impl)
        assert not out[0, 13].isfinite().any()
        assert precision != torch.int8 or out[0, 13].isnan().all()
        others = torch.arange(30) != 13
        assert torch.equal(out[:, others], expected[:, others])


@pytest.mark.parametrize("activation", ["relu", "silu", "geglu"])
@pytest.mark.parametrize(("precision", "k"), [(torch.float32, 20), (torch.bfloat16, 24)])
def test_activations_keep_nan(impl: str, activation: str, precision: torch.dtype, k: int) -> None:
    x, weight = randn(1, 9, k), make_weight(64, k, precision)
    expected = ops.linear(x, weight, activation=activation, impl=impl)
    x[0, 4, 7] = float("nan")
    out = ops.linear(x, weight, activation=activation, impl=impl)
    assert out[0, 4].isnan().all()
    others = torch.arange(9) != 4
    assert torch.equal(out[:, others], expected[:, others])


# --- memory -----------------------------------------------------------------------------------------------------------


def strided_variants() -> dict[str, Tensor]:
    x = randn(3, 10, 40)
    wide = torch.full((3, 20, 130), float("nan"))
    wide[:, ::2, 30:70] = x
    spread = torch.full((3, 10, 80), float("nan"))
    spread[..., ::2] = x
    return {
        "columns of a wider tensor": wide[:, ::2, 30:70],
        "every second channel": spread[..., ::2],
        "transposed": x.mT.contiguous().mT,
        "images innermost": x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "one image for all": x[:1].expand(3, -1, -1),
        "one row for all": x[:, :1].expand(-1, 10, -1),
    }


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", list(strided_variants()))
def test_strides_do_not_matter(impl: str, layout: str, precision: torch.dtype) -> None:
    x = strided_variants()[layout]
    weight, double = make_weight(40, 40, precision), make_weight(40, 80, precision)
    expected = ops.linear(x.contiguous(), weight, residual=x.contiguous(), impl=impl)
    assert torch.equal(ops.linear(x, weight, residual=x, impl=impl), expected)
    expected = ops.linear(x.contiguous(), double, x2=x.contiguous(), norm="layer", impl=impl)
    assert torch.equal(ops.linear(x, double, x2=x, norm="layer", impl=impl), expected)
    if "for all" not in layout:
        out = torch.empty_strided(x.shape, x.stride())
        assert ops.linear(x, weight, residual=x, impl=impl, out=out) is out
        assert torch.equal(out, ops.linear(x, weight, residual=x, impl=impl))


@pytest.mark.parametrize("n", [1, 15, 16, 33, 70])
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "geglu"])
def test_writes_the_result_and_nothing_else(impl: str, n: int, out_dtype: torch.dtype, activation: str | None) -> None:
    buffer = torch.full((2, 40, n + 40), -7.0, dtype=out_dtype)
    out = buffer[:, 3:36, 20 : 20 + n]
    weight = make_weight(2 * n if activation else n, 24, torch.bfloat16)
    x, options = randn(2, 33, 24), {"activation": activation, "impl": impl}
    ops.linear(x, weight, out=out, **options)
    assert torch.equal(out, ops.linear(x, weight, out_dtype=out_dtype, **options))
    assert not (out == -7).any()
    out.fill_(-7)
    assert (buffer == -7).all()


@pytest.mark.parametrize(("precision", "k"), [(torch.float32, 20), (torch.bfloat16, 24)])
def test_result_in_place_of_the_residual(impl: str, precision: torch.dtype, k: int) -> None:
    x, weight, residual = randn(2, 30, k), make_weight(50, k, precision), randn(2, 30, 50)
    expected = ops.linear(x, weight, residual=residual, impl=impl)
    assert torch.equal(ops.linear(x, weight, residual=residual, out=residual, impl=impl), expected)
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_batch(impl: str, batch: int) -> None:
    """Five images of 50 rows: blocks of rows begin and end within images."""
    x, affine, residual = randn(batch, 50, 32), randn(batch, 2, 32), randn(batch, 50, 33)
    weight = make_weight(33, 32, torch.int8)
    whole = ops.linear(x, weight, affine=affine, residual=residual, impl=impl)
    assert whole.shape == (batch, 50, 33)
    for i in range(batch):
        part = slice(i, i + 1)
        one = ops.linear(x[part], weight, affine=affine[part], residual=residual[part], impl=impl)
        assert torch.equal(whole[part], one)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("m", "n"), [(500, 40), (90, 200), (30, 10), (1, 70), (2100, 33)])
def test_threads_and_repetition_do_not_change_a_bit(isa: str, precision, m: int, n: int) -> None:
    """500 rows are blocks of one thread, and with two threads rows that both share."""
    x, weight, bias = randn(1, m, 37, dtype=torch.bfloat16), make_weight(n, 37, precision), randn(n)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(ops.linear(x, weight, bias, norm="layer", impl="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_offsets_beyond_32_bits() -> None:
    """Images that are more than 2**31 elements apart, without that much memory."""
    storage = untouched((1 << 31) + 1000)
    weight = make_weight(16, 16, torch.float32)
    x = storage.as_strided((2, 4, 16), (1 << 31, 16, 1))
    out = storage[100:].as_strided((2, 4, 16), (1 << 31, 16, 1))
    x.copy_(randn(2, 4, 16))
    expected = ops.linear(x.contiguous(), weight)
    assert torch.equal(ops.linear(x, weight), expected)
    assert torch.equal(ops.linear(x, weight, out=out), expected)


# --- contract ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ONE_PRECISION)
def test_opcheck(precision: torch.dtype) -> None:
    op, weight = ops.registry()["linear"], make_weight(6, 20, precision)
    x, x2, residual = randn(2, 5, 8), randn(2, 5, 12, dtype=torch.bfloat16), randn(2, 5, 3)
    options = {"norm": "layer", "affine": randn(2, 2, 20), "scale": randn(20), "activation": "geglu"}
    for name in ("auto", "cpu", "reference"):
        statistics = Statistics(torch.zeros(statistics_shape(2, 5, 3)), 64) if name == "reference" else None
        call = op.bind(x, weight, randn(6), x2=x2, residual=residual, statistics=statistics, **options)
        torch.library.opcheck(torch.ops.vpd_fast.linear.default, (*op.flatten(call), name))


@pytest.mark.parametrize("precision", ONE_PRECISION)
def test_torch_compile_through_the_public_function(precision: torch.dtype) -> None:
    weight, bias = make_weight(12, 8, precision), randn(12)

    def run(x: Tensor) -> Tensor:
        return ops.linear(x * 2, weight, bias, norm="layer", activation="geglu") + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 7):
        x = randn(2, rows, 8)
        assert torch.equal(compiled(x), run(x))
