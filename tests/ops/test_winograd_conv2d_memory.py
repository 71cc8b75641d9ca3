"""winograd_conv2d: what it reads and writes, and the errors of unsuitable arguments."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from torch import Tensor

from vpd_fast import ops
from vpd_fast.errors import InputError
from vpd_fast.ops.packing import PackedWeight

from .winograd_cases import PRECISIONS, TAPS, everything, make_problem


def layouts_of(x: Tensor) -> dict[str, Tensor]:
    """The same numbers in other layouts; what lies between them is NaN."""
    batch, height, width, channels = x.shape
    wide = x.new_full((batch, height, width, channels + 11), torch.nan)
    wide[..., 3 : 3 + channels] = x
    spread = x.new_full((batch, 2 * height, 2 * width, 2 * channels), torch.nan)
    spread[:, ::2, ::2, ::2] = x
    return {
        "channels of a wider tensor": wide[..., 3 : 3 + channels],
        "channels first": x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "every second": spread[:, ::2, ::2, ::2],
        "columns before rows": x.transpose(1, 2).contiguous().transpose(1, 2),
    }


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(isa: str, dtype: torch.dtype, precision: torch.dtype) -> None:
    problem = make_problem((2, 5, 6, 21), 18, 16, precision, dtype, c2=12)
    problem = problem.using(**everything(problem))
    expected = problem.run()
    for name in layouts_of(problem.x):
        options = {key: layouts_of(problem.options[key])[name] for key in ("x2", "residual")}
        other = problem.using(**options)
        other.x = layouts_of(problem.x)[name]
        out = layouts_of(expected)[name]
        out.fill_(7)
        assert other.run(out=out) is out
        assert torch.equal(out, expected), name


def test_one_image_for_all(isa: str) -> None:
    problem = make_problem((1, 5, 6, 16), 18, 16)
    expected = problem.run()
    problem.x = problem.x.expand(3, -1, -1, -1)
    assert torch.equal(problem.run(), expected.expand(3, -1, -1, -1))


@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_nothing_else_is_written(isa: str, taps: int, out_dtype: torch.dtype) -> None:
    problem = make_problem((2, 7, 5, 16), 21, taps)
    zoom = 2 if taps == 9 else 1
    memory = torch.full((2, 7 * zoom + 2, 5 * zoom + 2, 40), 7.0, dtype=out_dtype)
    out = memory[:, 1:-1, 1:-1, 9:30]
    problem.run(out=out)
    assert torch.equal(out, problem.run(out_dtype=out_dtype))
    out.fill_(7)
    assert (memory == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_may_be_the_result(isa: str, dtype: torch.dtype) -> None:
    problem = make_problem((2, 6, 5, 16), 35, 16, torch.bfloat16, dtype)
    out = torch.randn(2, 6, 5, 35).to(dtype)
    expected = problem.run(residual=out.clone())
    assert torch.equal(problem.run(residual=out, out=out), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_nothing_behind_the_last_channel(isa: str, dtype: torch.dtype) -> None:
    """All inputs end where memory ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    kept = []

    def at_the_end(x: Tensor) -> Tensor:
        size = x.numel() * x.element_size()
        pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        raw = torch.frombuffer(mmap.mmap(-1, pages + mmap.PAGESIZE), dtype=torch.uint8)
        kept.append(raw)
        guard = ctypes.c_void_p(raw.data_ptr() + pages)
        assert libc.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        moved = raw[pages - size : pages].view(x.dtype).view(x.shape)
        return moved.copy_(x)

    problem = make_problem((1, 5, 7, 19), 37, 16, torch.int8, dtype, c2=14)
    problem = problem.using(**everything(problem))
    expected = problem.run()
    moved = {name: at_the_end(x) if isinstance(x, Tensor) else x for name, x in problem.options.items()}
    problem = problem.using(**moved, out=at_the_end(expected))
    problem.x = at_the_end(problem.x)
    assert torch.equal(problem.run(), expected)


def test_offsets_beyond_32_bits(isa: str) -> None:
    """Two images 2^31 elements apart, in memory of which only their pages exist."""
    problem = make_problem((2, 3, 4, 16), 8, 16, torch.bfloat16, torch.bfloat16)
    expected = problem.run()
    apart = 2**31 + 64
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (apart + 4096)), dtype=torch.bfloat16)
    x, out = (memory[at:].as_strided((2, 3, 4, c), (apart, 4 * c, c, 1)) for at, c in ((0, 16), (1024, 8)))
    problem.x = x.copy_(problem.x)
    assert torch.equal(problem.run(out=out), expected)


def weight_of(n: int, channels: int, taps: int) -> PackedWeight:
    return PackedWeight.pack(torch.ones(taps, n, channels), torch.float32)


GOOD = {"x": torch.zeros(1, 4, 4, 8), "weight": weight_of(6, 8, 16)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 4, 8)}, r"x must have shape \(B, H, W, C1\), got \(4, 4, 8\)"),
        ({"x": torch.zeros(1, 0, 4, 8)}, "x has no elements along H"),
        (
            {"x": torch.zeros(1, 4, 4, 8).double()},
            "x must be torch.float32 or torch.bfloat16 or torch.float16, got torch.float64",
        ),
        ({"x2": torch.zeros(1, 4, 5, 8)}, r"x2 must have shape \(B=1, H=4, W=4, C2\), got \(1, 4, 5, 8\)"),
        ({"x2": torch.zeros(1, 4, 4, 8)}, "weight must have 16 columns as the input says, got 8"),
        ({"weight": torch.zeros(16, 6, 8)}, "weight must be a PackedWeight of winograd_weight.* got Tensor"),
        ({"weight": weight_of(6, 8, 1)}, "weight must have 16 or 36 taps without upsample, got 1"),
        ({"weight": weight_of(6, 8, 9)}, "weight must have 16 or 36 taps without upsample, got 9"),
        ({"upsample": True}, "weight must have 9 taps with upsample=True, got 16"),
        ({"upsample": 1}, "upsample must be True or False, got 1"),
        ({"silu": "yes"}, "silu must be True or False, got 'yes'"),
        ({"bias": torch.zeros(8)}, r"bias must have shape \(N=6\), got \(8,\)"),
        ({"affine": torch.zeros(1, 8, 2)}, r"affine must have shape \(B=1, 2=2, C=8\), got \(1, 8, 2\)"),
        ({"scale": torch.zeros(8).double()}, "scale must be torch.float32, got torch.float64"),
        ({"residual": torch.zeros(1, 4, 4, 8)}, r"residual must have shape .*N=6\), got \(1, 4, 4, 8\)"),
        ({"activation": "geglu"}, "activation must be None, 'relu' or 'silu', got 'geglu'"),
        ({"out_dtype": torch.float64}, "out_dtype must be None, float32, bfloat16 or float16, got torch.float64"),
        ({"out": torch.zeros(1, 4, 4, 8)}, r"out must have shape .*N=6\), got \(1, 4, 4, 8\)"),
        ({"out": torch.zeros(1, 4, 4, 6), "out_dtype": torch.bfloat16}, "out must be of out_dtype=torch.bfloat16"),
        ({"out": torch.zeros(1, 1, 1, 6).expand(1, 4, 4, 6)}, "out must not be expanded"),
        ({"bias": torch.zeros(6, device="meta")}, "bias must be on cpu as x is, got meta"),
        ({"bias": torch.zeros(6, requires_grad=True)}, "bias requires gradients, which winograd_conv2d does not"),
        ({"x": torch.zeros(1, 4, 4, 8, requires_grad=True)}, "x requires gradients"),
        ({"impl": "cuda"}, "impl must be 'auto' or an implementation .* got 'cuda'"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ops.winograd_conv2d(**(GOOD | change))


@pytest.mark.parametrize(
    ("weight", "taps", "message"),
    [
        (torch.zeros(4, 4, 1, 1), 16, r"weight must have shape \(N, C, height=3, width=3\), got \(4, 4, 1, 1\)"),
        (torch.zeros(4, 4, 3, 3).int(), 16, "weight must be .* got torch.int32"),
        (torch.zeros(4, 4, 3, 3), 25, "taps must be 9, 16 or 36, got 25"),
    ],
)
def test_bad_weight(weight: Tensor, taps: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ops.winograd_weight(weight, taps)


def test_parameters_are_fine_where_no_gradients_are_recorded() -> None:
    with torch.no_grad():
        assert not ops.winograd_conv2d(**GOOD, bias=torch.ones(6, requires_grad=True)).requires_grad


def test_the_kernel_says_why_it_cannot_run() -> None:
    weight = GOOD["weight"]
    on_meta = PackedWeight(weight.data.to("meta"), None, None, weight.n, weight.k)
    reasons = ops.explain("winograd_conv2d", GOOD["x"].to("meta"), on_meta)
    assert reasons == {"cpu": "x is on meta, not on the CPU", "reference": "ok"}
