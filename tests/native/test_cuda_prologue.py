"""The kernels that prepare rows in CUDA C++, emulated: what they round, bit by bit where no activation comes before."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast.ops.packing import FLOAT8
from vpd_fast.ops.rounding import quantize_rows, round_rows_to_float8

from .cuda_gemm_cases import UNIT, memory_of, name_of
from .devices import A100, H200, Device

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
ROUNDING = {torch.int8: quantize_rows, FLOAT8: round_rows_to_float8}
SMALL = H200._replace(processors=2)  # whose blocks have long ways


@dataclass(frozen=True)
class Case:
    """Sizes and options of a call; padding: top, left, bottom, right."""

    shape: tuple[int, int, int] = (2, 5, 9)
    channels: tuple[int, ...] = (24,)
    dtype: torch.dtype = BFLOAT16
    out: torch.dtype = torch.int8
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    affine: bool = False
    factors: bool = False
    silu: bool = False
    norm: bool = False
    rounding: str = "image"  # or plain, or row
    known: bool = False  # ranges of images
    pitch: int = 0  # 16 bytes between the channels of positions
    special: tuple[float, ...] = ()  # numbers among others


@dataclass
class Made:
    """What a call wrote."""

    out: Tensor
    scales: Tensor
    zeros: Tensor


def sources_of(case: Case) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(case.channels) + sum(case.shape))
    found = []
    for width in case.channels:
        room = width + case.pitch * 16 // case.dtype.itemsize
        x = torch.full((*case.shape, room), float("nan"), dtype=case.dtype)[..., :width]
        found.append(x.copy_(torch.randn(x.shape, generator=generator) * 2 + 0.3))
    for i, value in enumerate(case.special):
        found[0][0, i % case.shape[1], 0, i] = value
    return found


def vectors_of(case: Case) -> tuple[Tensor | None, Tensor | None]:
    generator = torch.Generator().manual_seed(7)
    channels = sum(case.channels)
    affine = torch.randn(case.shape[0], 2, channels, generator=generator) if case.affine else None
    return affine, torch.rand(channels, generator=generator) + 0.5 if case.factors else None


def run(cuda: ModuleType, case: Case, device: Device = H200, ranges: Tensor | None = None) -> Made:
    """What the emulated device makes of the case; addresses beyond its tensors are errors."""
    cuda.configure(*device)
    sources, (affine, factors) = sources_of(case), vectors_of(case)
    top, left, bottom, right = case.padding
    batch, height, width = case.shape
    sides = height + top + bottom, width + left + right
    out = torch.full((batch, *sides, sum(case.channels)), 64).to(case.out)
    scales = torch.full((batch * (sides[0] * sides[1] if case.rounding == "row" else 1),), float("nan"))
    zeros = scales.clone()
    address = lambda t: 0 if t is None else t.data_ptr()  # noqa: E731
    call = cuda.Prologue(
        [(x.data_ptr(), x.stride()[:3], x.shape[3]) for x in sources],
        name_of(case.dtype),
        case.shape,
        (top, left, *sides),
        address(affine),
        address(factors),
        case.norm,
        1e-5,
        case.silu,
        out.data_ptr(),
        name_of(case.out),
        scales.data_ptr(),
        zeros.data_ptr() if case.out == torch.int8 else 0,
    )

    def launch(rounding: str, ranges: Tensor | None, writes: bool) -> None:
        read = [*sources, *(t for t in (affine, factors) if t is not None)]
        written = [out, scales, zeros]
        (written if writes else read).extend([] if ranges is None else [ranges])
        memory = [*((x, False) for x in read), *((x, True) for x in written)]
        cuda.announce([(*memory_of(x), writable) for x, writable in memory])
        call.run(rounding, address(ranges), 0 if ranges is None else ranges.shape[2], 0, 0)

    if case.rounding == "image" and ranges is None:
        ranges = torch.full((batch, 2, call.parts(0)), float("nan"))
        launch("range", ranges, True)
        assert (out.float() == 64).all()
    launch(case.rounding, ranges, False)
    return Made(out, scales, zeros)


def numbers_of(case: Case) -> Tensor:
    """What is to be rounded, float32, with zeros around it."""
    affine, factors = vectors_of(case)
    a = torch.cat([x.float() for x in sources_of(case)], -1)
    if case.norm:
        a = F.layer_norm(a, a.shape[-1:], eps=1e-5)
    if affine is not None:  # products are not rounded before they are added to
        a = (a.double() * affine[:, None, None, 0].double() + affine[:, None, None, 1].double()).float()
    a = F.silu(a) if case.silu else a
    a = a if factors is None else a * factors
    top, left, bottom, right = case.padding
    return F.pad(a, (0, 0, left, right, top, bottom))


def rounded(case: Case, a: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Whole numbers, or numbers of float8, and scales, as the reference rounds rows or images."""
    whole = a if case.rounding == "row" else a.flatten(1)
    ranges = None if known is None else (known[:, 0].amin(1, keepdim=True), known[:, 1].amax(1, keepdim=True))
    values, scales = ROUNDING[case.out](whole, ranges)
    return values.view(a.shape), scales.flatten()


def check_exact(cuda: ModuleType, case: Case, device: Device = H200, known: Tensor | None = None) -> Made:
    made = run(cuda, case, device, known)
    a = numbers_of(case)
    if case.rounding == "plain":
        assert torch.equal(made.out, a.to(case.out))
        return made
    values, scales = rounded(case, a, known)
    torch.testing.assert_close(made.scales, scales, rtol=0, atol=0, equal_nan=True)
    finite = scales.isfinite().view(-1, *[1] * (3 if case.rounding == "image" else 0))
    finite = finite if case.rounding == "image" else finite.view(*a.shape[:3], 1)
    stored = made.out.float()
    if case.out == torch.int8:
        zeros = made.zeros.view(-1, 1, 1, 1) if case.rounding == "image" else made.zeros.view(*a.shape[:3], 1)
        stored = stored - zeros
    assert torch.equal(stored.where(finite, 0.0), values.where(finite, 0.0))
    return made


LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"padding": (1, 1, 1, 1)},
    "only below": {"padding": (0, 0, 1, 1), "channels": (8, 16)},
    "wide padding": {"padding": (2, 70, 0, 3), "shape": (1, 3, 4)},
    "apart": {"pitch": 1, "padding": (1, 0, 0, 2)},
    "apart, without padding": {"pitch": 2, "channels": (16, 40)},
    "many positions": {"shape": (1, 3, 150), "channels": (32,)},
    "a matrix": {"shape": (2, 37, 1)},
    "many channels": {"shape": (1, 2, 3), "channels": (2048, 136)},
}
OUTPUTS = (BFLOAT16, FLOAT16, torch.int8, FLOAT8)


@pytest.mark.parametrize("out", OUTPUTS, ids=name_of)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_bits_of_every_layout(cuda: ModuleType, layout: str, out: torch.dtype) -> None:
    rounding = "image" if out.itemsize == 1 else "plain"
    case = Case(out=out, rounding=rounding, affine=True, **LAYOUTS[layout])
    for device in (H200, SMALL):
        check_exact(cuda, case, device)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32], ids=name_of)
@pytest.mark.parametrize("out", OUTPUTS, ids=name_of)
def test_bits_of_every_type(cuda: ModuleType, dtype: torch.dtype, out: torch.dtype) -> None:
    rounding = "image" if out.itemsize == 1 else "plain"
    check_exact(cuda, Case(dtype=dtype, out=out, rounding=rounding, channels=(8, 8), factors=True))


@pytest.mark.parametrize("out", [torch.int8, FLOAT8], ids=name_of)
@pytest.mark.parametrize("channels", [(8,), (40,), (320,), (1024, 8), (1280, 640)], ids=str)
def test_rows_of_8_bits(cuda: ModuleType, channels: tuple[int, ...], out: torch.dtype) -> None:
    """One warp for a row, and several; more rows than blocks."""
    case = Case(shape=(2, 19, 1), channels=channels, out=out, rounding="row", factors=True)
    check_exact(cuda, case, H200._replace(processors=1))
    check_exact(cuda, replace(case, shape=(1, 2, 3), dtype=FLOAT32, affine=True))


@pytest.mark.parametrize("known", [(-3.0, 5.0), (-0.5, 0.25), (0.0, 0.0), (1.0, 2.0), (-4.0, float("nan"))], ids=str)
@pytest.mark.parametrize("out", [torch.int8, FLOAT8], ids=name_of)
def test_known_ranges(cuda: ModuleType, known: tuple[float, float], out: torch.dtype) -> None:
    """Of 40 parts. What lies beyond them becomes the nearest number there is."""
    ranges = torch.zeros(2, 2, 40)
    ranges[:, 0, 37], ranges[:, 1, 3] = known
    ranges[1] /= 2
    check_exact(cuda, Case(out=out, padding=(1, 1, 1, 1)), known=ranges)


SPECIAL = {
    "largest": (3.3e38, -3.3e38),
    "infinite": (float("inf"),),
    "not a number": (float("nan"),),
    "tiny": (1e-40, -1e-41),
    "zeros": (0.0, -0.0),
}


@pytest.mark.parametrize("rounding", ["image", "row"])
@pytest.mark.parametrize("out", [torch.int8, FLOAT8], ids=name_of)
@pytest.mark.parametrize("special", list(SPECIAL))
def test_special_numbers(cuda: ModuleType, special: str, out: torch.dtype, rounding: str) -> None:
    """Whatever is not finite makes the scale of its image or row NaN, and of no other."""
    case = Case(out=out, rounding=rounding, shape=(2, 3, 1), special=SPECIAL[special], dtype=FLOAT32)
    made = check_exact(cuda, case)
    beyond = special == "largest" and (out, rounding) == (torch.int8, "image")  # the difference of both numbers
    bad = beyond or special in ("infinite", "not a number")
    assert made.scales[0].isnan().item() == bad
    assert made.scales[-1].isfinite()


@pytest.mark.parametrize("out", OUTPUTS, ids=name_of)
@pytest.mark.parametrize("form", ["silu", "norm"])
def test_what_is_rounded_before(cuda: ModuleType, form: str, out: torch.dtype) -> None:
    """SiLU within 8 units, and normalised rows within 8 units and the roundings of their sums, of the largest number.

    Then a step of the result's type: half of it from rounding, and as much where the number lies in the middle.
    """
    rounding = {"silu": "image", "norm": "row"}[form] if out.itemsize == 1 else "plain"
    case = Case(shape=(1, 7, 1), channels=(320,), out=out, rounding=rounding, affine=form == "silu")
    case = replace(case, silu=form == "silu", norm=form == "norm")
    made, a = run(cuda, case), numbers_of(case)
    actual, largest = made.out.double(), a.double().abs().amax()
    if out == torch.int8:
        actual = actual - made.zeros.double().view(1, -1, 1, 1)
        step = made.scales.double().amax()
    else:
        step = {BFLOAT16: 2.0**-7, FLOAT16: 2.0**-10, FLOAT8: 2.0**-3}[out] * largest
    if rounding != "plain":
        actual = actual * made.scales.double().view(1, -1, 1, 1)
    assert (actual - a.double()).abs().max() <= step / 2 * 1.001 + (8 + 320**0.5) * UNIT[FLOAT32] * largest


def test_silu_of_every_size(cuda: ModuleType) -> None:
    """Within 8 units of the number, in float16, whose steps are larger, and right at the ends."""
    values = (-1e4, -100.0, -87.0, -20.0, -1.278, -1e-3, -0.0, 0.0, 1e-3, 1.0, 20.0, 100.0, 1e4, float("inf"))
    case = Case(
        shape=(1, 1, 1), out=FLOAT16, rounding="plain", silu=True, dtype=FLOAT32, special=values, channels=(16,)
    )
    actual, expected = run(cuda, case).out.float(), numbers_of(case).to(FLOAT16).float()
    assert torch.equal(actual.isfinite(), expected.isfinite())
    inside = expected.isfinite()
    assert ((actual - expected)[inside].abs() <= expected[inside].abs() * 2.0**-10 + 2.0**-24).all()


@pytest.mark.parametrize("order", range(4))
def test_results_do_not_depend_on_the_order_of_threads(cuda: ModuleType, order: int) -> None:
    case = Case(shape=(1, 9, 1), channels=(1280, 640), rounding="row", affine=True, norm=True)
    first, other = (run(cuda, case, SMALL._replace(order=o)) for o in (0, order))
    assert torch.equal(first.out, other.out)
    assert torch.equal(first.scales, other.scales)


def test_nothing_is_launched_for_no_images(cuda: ModuleType) -> None:
    cuda.launches()
    run(cuda, Case(shape=(0, 3, 4), rounding="plain", out=BFLOAT16))
    assert cuda.launches() == 0


@pytest.mark.parametrize(
    ("change", "device", "message"),
    [
        ({"channels": (12,)}, H200, "channels are not a multiple of 8"),
        ({"channels": (16, 4)}, H200, "channels are not a multiple of 8"),
        ({"out": FLOAT8}, A100, "does not round to 8-bit floating point"),
        ({"out": BFLOAT16}, H200, "the rounding is not that of the result's type"),
        ({"rounding": "plain"}, H200, "the rounding is not that of the result's type"),
        ({"norm": True}, H200, "not done for whole images"),
        ({"rounding": "row", "padding": (1, 1, 1, 1)}, H200, "rows of images with zeros around them"),
        ({"rounding": "row", "channels": (16384, 8)}, H200, "rows are too long"),
        ({"rounding": "columns"}, H200, "rounding 'columns' is not plain, row, image or range"),
    ],
)
def test_what_it_cannot_run(cuda: ModuleType, change: dict, device: Device, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(cuda, replace(Case(), **change), device, torch.zeros(2, 2, 1))


def test_misaligned_memory_is_refused(cuda: ModuleType) -> None:
    cuda.configure(*H200)
    x, out = torch.zeros(1, 3, 4, 20, dtype=BFLOAT16), torch.zeros(1, 3, 4, 8, dtype=torch.int8)
    scale = torch.zeros(1)
    shape = ((1, 3, 4), (0, 0, 3, 4), 0, 0, False, 0.0, False, out.data_ptr(), "int8", scale.data_ptr(), 0)

    def attempt(address: int, strides: tuple[int, ...]) -> None:
        call = cuda.Prologue([(address, strides, 8)], "bfloat16", *shape)
        call.run("image", scale.data_ptr(), 0, 0, 0)

    with pytest.raises(ValueError, match="strides of a source are not multiples of 16 bytes"):
        attempt(x.data_ptr(), x.stride()[:3])
    with pytest.raises(ValueError, match="a source is not aligned to 16 bytes"):
        attempt(x.data_ptr() + 8, (96, 32, 8))
