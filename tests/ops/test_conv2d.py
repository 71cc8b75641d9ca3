"""conv2d against float64, for every implementation, instruction set level and precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast.engine.rewrites import phase_weights
from vpd_fast.errors import InputError
from vpd_fast.ops import _gemm_reference
from vpd_fast.ops.packing import PackedWeight
from vpd_fast.ops.statistics import Statistics, statistics_shape

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
from .variants import ON_GPU, computed_on_gpu


def sides(padding: int | tuple[int, ...]) -> tuple[int, ...]:
    return (padding,) * 4 if isinstance(padding, int) else padding


def rows_of(
    x: Tensor,
    x2: Tensor | None,
    affine: Tensor | None,
    silu: bool,
    scale: Tensor | None,
    kernel: tuple[int, int],
    stride: int,
    padding: int | tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """What each output position reads, (B, H', W', kernel height * kernel width * C) in `dtype`."""
    a = x.to(dtype) if x2 is None else torch.cat([x.to(dtype), x2.to(dtype)], -1)
    a = a if affine is None else a * affine[:, 0, None, None].to(dtype) + affine[:, 1, None, None].to(dtype)
    a = F.silu(a) if silu else a
    a = a if scale is None else a * scale.to(dtype)
    top, left, bottom, right = sides(padding)
    padded = F.pad(a.permute(0, 3, 1, 2), (left, right, top, bottom))
    height, width = ((padded.shape[2 + i] - kernel[i]) // stride + 1 for i in range(2))
    columns = F.unfold(padded, kernel, stride=stride)  # images, (channel, dy, dx), position
    by_place = columns.unflatten(1, (-1, kernel[0] * kernel[1])).transpose(1, 2).flatten(1, 2)
    return by_place.transpose(1, 2).unflatten(1, (height, width))


def with_a_scale_per_image(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    out_dtype: torch.dtype | None,
    **rest: object,
) -> tuple[Tensor, Tensor]:
    """conv2d in 8 bits as GPUs compute it: the whole image shares scale and zero. Also the numbers of each image."""
    a = _gemm_reference.prologue(
        _gemm_reference.concatenated(x, rest["x2"]), rest["affine"], rest["silu"], rest["scale"]
    ).flatten(1)
    ranges = torch.stack([a.amin(1, keepdim=True), a.amax(1, keepdim=True)], dim=1)
    options = {"activation": activation, "residual": residual, "out_dtype": out_dtype, "impl": "reference", **rest}
    return ops.conv2d(x, weight, bias, ranges=ranges, **options), a.double()[:, None, None]


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
    **rest: object,
) -> Tensor:
    """Runs conv2d and holds the result to float64, or for 8 bits to the reference, which is held to the rounding."""
    options = dict(activation=activation, residual=residual, out_dtype=out_dtype, **rest)
    actual = ops.conv2d(x, weight, bias, impl=impl, **options)
    assert actual.dtype == (out_dtype or x.dtype)
    default = {"x2": None, "affine": None, "silu": False, "scale": None, "kernel": (1, 1), "stride": 1, "padding": 0}
    exact_a = rows_of(x, **default | rest, dtype=torch.float64)
    if weight.dtype.itemsize == 1:
        plain = ops.conv2d(x, weight, bias, out_dtype=torch.float32, impl=impl, **rest)
        if impl in ON_GPU:
            reference, ranged = with_a_scale_per_image(x, weight, bias, **default | options)
        else:
            reference, ranged = ops.conv2d(x, weight, bias, impl="reference", **options), None
        few_bits = computed_on_gpu(impl)
        WITHIN_ROUNDING[weight.dtype](plain, exact_a, weight, bias, ranged, few_bits)
        assert_same_as_reference(actual, reference, weight, exact_rows, few_bits)
        return actual
    same_a = rows_of(x, **default | rest, dtype=torch.float32).to(weight.dtype).float()
    end = weight, bias, activation, residual
    assert_close(actual, complete(same_a, *end), complete(exact_a, *end), weight.k, options.keys())
    return actual


def test_is_the_convolution_of_pytorch(impl: str) -> None:
    """The order of the weight's columns, and which input belongs to which output."""
    layer = torch.nn.Conv2d(5, 7, (3, 2), stride=2)
    x = randn(2, 9, 8, 5)
    with torch.no_grad():
        weight = PackedWeight.pack(layer.weight.permute(0, 2, 3, 1).flatten(1)[None], torch.float32)
        actual = ops.conv2d(x, weight, layer.bias, kernel=(3, 2), stride=2, padding=(1, 2, 0, 1), impl=impl)
        expected = layer(F.pad(x.permute(0, 3, 1, 2), (2, 1, 1, 0))).permute(0, 2, 3, 1)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("transformed", [True, False])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 4), (5, 3)])
def test_upsampling(impl: str, height: int, width: int, transformed: bool, precision: torch.dtype) -> None:
    """Each phase is the 2x2 convolution that it says, and the whole is a convolution of the enlarged image."""
    x, residual, bias = randn(2, height, width, 16), randn(2, 2 * height, 2 * width, 9), randn(9)
    filters = randn(9, 16, 3, 3) / 10
    weight = PackedWeight.pack(phase_weights(filters).permute(0, 1, 3, 4, 2).flatten(2), precision)
    options = {"affine": randn(2, 2, 16), "silu": True, "x2": None} if transformed else {}
    out = torch.full((2, 2 * height, 2 * width, 9), torch.nan)
    given = {"kernel": (2, 2), "impl": impl, **options}
    assert ops.conv2d(x, weight, bias, upsample=True, residual=residual, out=out, **given) is out
    for i in range(4):
        y, x_ = divmod(i, 2)
        part, phase = {"padding": (1 - y, 1 - x_, y, x_)}, (slice(None), slice(y, None, 2), slice(x_, None, 2))
        alone = ops.conv2d(x, weight.matrix(i), bias, residual=residual[phase], **part, **given)
        # Padding of 8-bit images belongs to what is rounded, but is always 0, which the range has in it.
        torch.testing.assert_close(out[phase], alone, rtol=0, atol=0)
    if precision == torch.float32:
        a = _gemm_reference.prologue(x, options.get("affine"), transformed, None).permute(0, 3, 1, 2)
        expected = F.conv2d(F.interpolate(a, scale_factor=2.0, mode="nearest"), filters, bias, padding=1)
        torch.testing.assert_close(out, expected.permute(0, 2, 3, 1) + residual, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("channels", [3, 4, 48, 790])
def test_channels_that_are_not_aligned(impl: str, channels: int, precision: torch.dtype) -> None:
    """Of an image, of latents and of features with maps: pixels that begin anywhere, also in a larger tensor."""
    if impl == "triton" and channels == 790:
        channels = 70  # the interpreter takes as long for each block of channels
    wide = randn(1, 3, 4, channels + 3, dtype=torch.bfloat16)
    weight, bias = make_weight(5, 9 * channels, precision), randn(5)
    for x in (wide[..., :channels], wide[..., 3:]):
        check(impl, x, weight, bias, kernel=(3, 3), padding=1, residual=wide[..., 1:6] if channels > 4 else None)


GEOMETRIES = [  # height, width, kernel, stride, padding
    (1, 1, (1, 1), 1, 0),
    (6, 7, (1, 1), 1, 0),
    (6, 7, (1, 1), 2, 0),
    (6, 7, (1, 1), 1, (1, 0, 0, 2)),
    (8, 8, (3, 3), 1, 1),
    (8, 8, (3, 3), 2, (0, 0, 1, 1)),
    (9, 7, (3, 3), 2, 1),
    (9, 7, (3, 3), 2, (0, 0, 1, 1)),
    (3, 3, (3, 3), 1, 0),
    (2, 2, (3, 3), 1, 1),
    (1, 5, (3, 3), 1, 1),
    (5, 1, (3, 3), 3, 1),
    (7, 9, (2, 2), 2, 0),
    (7, 9, (4, 1), 3, (2, 1, 0, 3)),
    (2, 3, (1, 5), 1, (0, 4, 0, 4)),
    (2, 2, (2, 2), 1, (3, 3, 3, 3)),
    (40, 33, (3, 3), 2, 1),
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("channels", [3, 4, 16, 21])
@pytest.mark.parametrize(("height", "width", "kernel", "stride", "padding"), GEOMETRIES)
def test_geometry(impl: str, height, width, kernel, stride, padding, channels: int, precision) -> None:
    weight = make_weight(19, kernel[0] * kernel[1] * channels, precision)
    x, how = randn(2, height, width, channels), {"kernel": kernel, "stride": stride, "padding": padding}
    check(impl, x, weight, randn(19), exact_rows=True, **how)
    check(impl, x, weight, affine=randn(2, 2, channels), **how)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("parts", [("affine",), ("silu",), ("scale",), ("affine", "silu", "scale")], ids="+".join)
@pytest.mark.parametrize("second", [0, 14, 5])
def test_transforms(impl: str, second: int, parts: tuple[str, ...], precision: torch.dtype) -> None:
    """Zeros are added after them: the affine map, whose shift is large, must not move the border."""
    channels = 18 + second
    whole = {"affine": 3 + randn(2, 2, channels), "silu": True, "scale": 1 + randn(channels).abs()}
    x, x2 = randn(2, 6, 5, 18), randn(2, 6, 5, second, dtype=torch.bfloat16) if second else None
    chosen = {name: whole[name] for name in parts}
    weight = make_weight(22, 9 * channels, precision)
    check(impl, x, weight, randn(22), x2=x2, kernel=(3, 3), padding=1, **chosen)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("x2_dtype", [None, *DTYPES])
@pytest.mark.parametrize("out_dtype", [None, *DTYPES])
def test_dtypes(impl: str, x_dtype, x2_dtype, out_dtype, precision) -> None:
    channels = 6 if x2_dtype is None else 16
    x, x2 = randn(1, 5, 7, 6, dtype=x_dtype), None if x2_dtype is None else randn(1, 5, 7, 10, dtype=x2_dtype)
    weight = make_weight(35, 4 * channels, precision)
    for residual_dtype in DTYPES:
        residual = randn(1, 4, 6, 35, dtype=residual_dtype)
        options = {"residual": residual, "out_dtype": out_dtype, "kernel": (2, 2)}
        check(impl, x, weight, randn(35), x2=x2, exact_rows=True, **options)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("activation", [None, "relu", "silu", "geglu"])
def test_activations(impl: str, activation: str | None, precision: torch.dtype) -> None:
    n = 17 if activation == "geglu" else 34
    x, weight, residual = 3 * randn(2, 5, 4, 8), make_weight(34, 72, precision), randn(2, 5, 4, n)
    for addend in (None, residual):
        options = {"activation": activation, "residual": addend, "kernel": (3, 3), "padding": 1}
        check(impl, x, weight, randn(34), exact_rows=True, **options)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_long_sums(impl: str, precision: torch.dtype) -> None:
    check(impl, randn(1, 4, 4, 528), make_weight(33, 4752, precision), kernel=(3, 3), padding=1, exact_rows=True)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_reads_only_zeros_gives_the_bias(impl: str, precision: torch.dtype) -> None:
    bias = randn(20)
    weight = make_weight(20, 9 * 16, precision)
    out = ops.conv2d(randn(1, 3, 3, 16), weight, bias, kernel=(3, 3), padding=(5, 4, 3, 3), impl=impl)
    assert torch.equal(out[:, :3], bias.expand(1, 3, 8, -1))
    assert torch.equal(out[:, :, :2], bias.expand(1, 9, 2, -1))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@pytest.mark.parametrize("channels", [5, 16])
def test_what_is_not_finite_reaches_exactly_what_reads_it(impl: str, channels: int, special: float, precision) -> None:
    x, weight = randn(1, 9, 8, channels), make_weight(20, 9 * channels, precision)
    how = {"kernel": (3, 3), "stride": 2, "padding": 1}
    expected = ops.conv2d(x, weight, impl=impl, **how)
    x[0, 3, 4, 2] = special
    out = ops.conv2d(x, weight, impl=impl, **how)
    reads = torch.zeros(5, 4, dtype=torch.bool)
    reads[1:3, 2] = True  # rows 1 to 3 and 3 to 5, columns 3 to 5
    assert not out[0, reads].isfinite().any()
    if impl in ON_GPU and precision == torch.int8:  # the image has one scale
        assert out.isnan().all()
        return
    assert precision != torch.int8 or out[0, reads].isnan().all()
    assert torch.equal(out[0, ~reads], expected[0, ~reads])


def strided_variants() -> dict[str, Tensor]:
    x = randn(2, 6, 7, 12)
    wide = torch.full((2, 12, 9, 30), float("nan"))
    wide[:, ::2, 1:8, 9:21] = x
    return {
        "part of a wider image": wide[:, ::2, 1:8, 9:21],
        "channels first": x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "columns first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "one image for all": x[:1].expand(2, -1, -1, -1),
    }


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", list(strided_variants()))
def test_strides_do_not_matter(impl: str, layout: str, precision: torch.dtype) -> None:
    x, weight = strided_variants()[layout], make_weight(12, 9 * 24, precision)
    how = {"kernel": (3, 3), "padding": 1, "impl": impl}
    dense = x.contiguous()
    expected = ops.conv2d(dense, weight, x2=dense, residual=dense, **how)
    assert torch.equal(ops.conv2d(x, weight, x2=x, residual=x, **how), expected)
    plain = make_weight(12, 9 * 12, precision)
    assert torch.equal(ops.conv2d(x, plain, **how), ops.conv2d(dense, plain, **how))
    if "for all" not in layout:
        out = torch.empty_strided(x.shape, x.stride())
        assert ops.conv2d(x, weight, x2=x, residual=x, out=out, **how) is out
        assert torch.equal(out, expected)


@pytest.mark.parametrize("n", [1, 16, 33])
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_writes_the_result_and_nothing_else(impl: str, n: int, out_dtype: torch.dtype) -> None:
    buffer = torch.full((2, 9, 8, n + 30), -7.0, dtype=out_dtype)
    out = buffer[:, 2:7, 1:7, 11 : 11 + n]
    x, weight = randn(2, 5, 6, 8), make_weight(n, 72, torch.bfloat16)
    ops.conv2d(x, weight, kernel=(3, 3), padding=1, out=out, impl=impl)
    assert torch.equal(out, ops.conv2d(x, weight, kernel=(3, 3), padding=1, out_dtype=out_dtype, impl=impl))
    assert not (out == -7).any()
    out.fill_(-7)
    assert (buffer == -7).all()


@pytest.mark.parametrize("batch", [0, 1, 4])
def test_batch(impl: str, batch: int) -> None:
    x, affine = randn(batch, 7, 5, 16), randn(batch, 2, 16)
    weight, how = make_weight(20, 144, torch.int8), {"kernel": (3, 3), "stride": 2, "padding": 1, "impl": impl}
    whole = ops.conv2d(x, weight, affine=affine, silu=True, **how)
    assert whole.shape == (batch, 4, 3, 20)
    for i in range(batch):
        part = slice(i, i + 1)
        assert torch.equal(whole[part], ops.conv2d(x[part], weight, affine=affine[part], silu=True, **how))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("side", [4, 23, 50])
def test_threads_and_repetition_do_not_change_a_bit(isa: str, precision: torch.dtype, side: int) -> None:
    x, weight = randn(1, side, side, 6, dtype=torch.bfloat16), make_weight(40, 54, precision)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.conv2d(x, weight, kernel=(3, 3), padding=1, silu=True, impl="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


# --- contract ---------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 5, 6, 4)
WEIGHT = make_weight(8, 36, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 6, 4)}, r"x must have shape \(B, H, W, C1\), got \(5, 6, 4\)"),
        ({"x": torch.zeros(2, 5, 0, 4)}, "x has no elements along W"),
        ({"x": X.double()}, "x must be torch.float32 or torch.bfloat16 or torch.float16, got torch.float64"),
        ({"x2": torch.zeros(2, 5, 5, 4)}, r"x2 must have shape \(B=2, H=5, W=6, C2\), got \(2, 5, 5, 4\)"),
        ({"x2": X}, "weight must have 72 columns as the input says, got 36"),
        ({"weight": None}, "weight must be a PackedWeight, got NoneType"),
        ({"kernel": 3}, r"kernel must be \(height, width\), got 3"),
        ({"kernel": (3, 0)}, "kernel must be two positive integers"),
        ({"kernel": (2, 3)}, "weight must have 24 columns as the input says, got 36"),
        ({"upsample": 1}, "upsample must be True or False, got 1"),
        ({"upsample": True}, r"upsample needs kernel \(2, 2\), stride 1, padding 0, got \(3, 3\), 1, \(0, 0, 0, 0\)"),
        ({"upsample": True, "kernel": (2, 2)}, "weight must have 4 matrices, got 1"),
        ({"stride": 0}, "stride must be a positive integer, got 0"),
        ({"stride": (2, 2)}, r"stride must be a positive integer, got \(2, 2\)"),
        ({"padding": (1, 1)}, r"padding must be an integer, or \(top, left, bottom, right\), .* got \(1, 1\)"),
        ({"padding": -1}, "padding must be an integer, or .* none of them negative, got -1"),
        (
            {"x": torch.zeros(2, 2, 6, 4)},
            r"kernel \(3, 3\) must fit into the image 2x6 with padding \(0, 0, 0, 0\)",
        ),
        ({"bias": torch.zeros(7)}, r"bias must have shape \(N=8\), got \(7,\)"),
        ({"affine": torch.zeros(2, 2, 5)}, r"affine must have shape \(B=2, 2=2, C=4\), got \(2, 2, 5\)"),
        ({"scale": torch.zeros(36)}, r"scale must have shape \(C=4\), got \(36,\)"),
        ({"silu": 1}, "silu must be True or False, got 1"),
        ({"activation": "tanh"}, "activation must be None, .* got 'tanh'"),
        ({"residual": torch.zeros(2, 5, 6, 8)}, r"residual must have shape \(B=2, height=3, width=4, N=8\)"),
        ({"out": torch.zeros(2, 3, 4, 9)}, r"out must have shape \(B=2, height=3, width=4, N=8\)"),
        ({"out_dtype": torch.float64}, "out_dtype must be None, float32, bfloat16 or float16, got torch.float64"),
        ({"affine": torch.zeros(2, 2, 4).requires_grad_()}, "affine requires gradients, which conv2d does not compute"),
        ({"impl": "gpu"}, "impl must be 'auto' or an implementation .* got 'gpu'"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    arguments = {"x": X, "weight": WEIGHT, "kernel": (3, 3), **change}
    with pytest.raises(InputError, match=message):
        ops.conv2d(**arguments)


@pytest.mark.parametrize("precision", ONE_PRECISION)
def test_opcheck(precision: torch.dtype) -> None:
    op, weight = ops.registry()["conv2d"], make_weight(8, 54, precision)
    x, x2, residual = randn(2, 5, 6, 4), randn(2, 5, 6, 2), randn(2, 3, 3, 8)
    options = {"kernel": (3, 3), "stride": 2, "padding": 1, "affine": randn(2, 2, 6), "silu": True, "scale": randn(6)}
    options |= {"x2": x2, "activation": "silu", "residual": residual}
    for name in ("auto", "cpu", "reference"):
        known = {"ranges": randn(2, 2, 3), "statistics": Statistics(torch.zeros(statistics_shape(2, 9, 8)), 64)}
        call = op.bind(x, weight, randn(8), **options, **(known if name == "reference" else {}))
        torch.library.opcheck(torch.ops.vpd_fast.conv2d.default, (*op.flatten(call), name))


def test_torch_compile_through_the_public_function() -> None:
    weight = make_weight(8, 36, torch.bfloat16)

    def run(x: Tensor) -> Tensor:
        return ops.conv2d(x * 2, weight, kernel=(3, 3), stride=2, padding=(0, 0, 1, 1), silu=True) + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for side in (4, 7):
        x = randn(1, side, side, 4)
        assert torch.equal(compiled(x), run(x))
