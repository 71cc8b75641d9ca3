"""`linear` and `conv2d` with impl="cuda_rows": emulated kernels prepare and multiply. Compared with impl="cuda"."""

from __future__ import annotations

import pytest
import torch

from vpd_fast import ops
from vpd_fast.errors import InputError
from vpd_fast.kernels import _prologue_cuda
from vpd_fast.ops.packing import FLOAT8

from .test_cuda_gemm_operators import instructions, make_weight, pytestmark, randn  # noqa: F401

by_wgmma = pytest.mark.parametrize("instructions", ["wgmma"], indirect=True)
precisions = pytest.mark.parametrize("precision", [torch.int8, FLOAT8, torch.bfloat16, torch.float16])
BFLOAT16 = torch.bfloat16


def distance(options: dict, *arguments: object, name: str = "conv2d") -> float:
    """L2 distance of the two implementations' results, of the result's length."""
    expected, actual = (getattr(ops, name)(*arguments, impl=impl, **options) for impl in ("cuda", "cuda_rows"))
    assert actual.dtype == expected.dtype
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


# Where nothing but roundings comes before, rows are the same bit by bit. SiLU and norms differ by some roundings of
# float32, so that in 8 bits a number in 10^4 is rounded the other way: by 1 / 255 of the range, or an eighth of itself.
CLOSE = {torch.int8: 2e-3, FLOAT8: 2e-2, torch.bfloat16: 2e-3, torch.float16: 2e-4}


@by_wgmma
@precisions
def test_conv2d(instructions: str, precision: torch.dtype) -> None:  # noqa: F811
    weight, x, x2 = (
        make_weight(24, 9 * 48, precision),
        randn(2, 9, 8, 32, dtype=BFLOAT16),
        randn(2, 9, 8, 16).bfloat16(),
    )
    how = {"kernel": (3, 3), "padding": 1, "x2": x2, "out_dtype": torch.float32}
    assert distance({**how, "scale": randn(48)}, x, weight) == 0
    assert distance({**how, "affine": randn(2, 2, 48), "silu": True}, x, weight, randn(24)) <= CLOSE[precision]
    ranges = torch.tensor([[[-1.0, -2.0], [3.0, 2.0]], [[-0.5, 0.0], [0.0, 4.0]]])
    assert distance({**how, "affine": randn(2, 2, 48), "ranges": ranges}, x, weight) == 0


@by_wgmma
@precisions
def test_linear(instructions: str, precision: torch.dtype) -> None:  # noqa: F811
    weight, x, x2 = make_weight(40, 48, precision), randn(2, 21, 32, dtype=BFLOAT16), randn(2, 21, 16).bfloat16()
    how = {"x2": x2, "out_dtype": torch.float32}
    assert distance({**how, "scale": randn(48)}, x, weight, name="linear") == 0
    normed = {**how, "norm": "layer", "affine": randn(2, 2, 48)}
    assert distance(normed, x, weight, name="linear") <= CLOSE[precision]
    wide = randn(2, 21, 100)[..., 3:51]  # copied, as it is not aligned
    assert distance({}, wide, weight, name="linear") == 0


@by_wgmma
@pytest.mark.parametrize(("widths", "other"), [((20, 28), BFLOAT16), ((32, 16), torch.float32)], ids=str)
def test_sources_that_are_joined_before(instructions: str, widths, other: torch.dtype) -> None:  # noqa: F811
    """Of other than whole vectors of channels, and of two types."""
    x, x2 = randn(2, 5, widths[0], dtype=BFLOAT16), randn(2, 5, widths[1], dtype=other)
    assert distance({"x2": x2, "scale": randn(48)}, x, make_weight(40, 48, torch.int8), name="linear") == 0


@by_wgmma
def test_rows_that_are_not_prepared(instructions: str) -> None:  # noqa: F811
    x, weight = randn(2, 5, 48, dtype=BFLOAT16), make_weight(40, 48, BFLOAT16)
    assert distance({}, x, weight, name="linear") == 0


@by_wgmma
def test_what_the_kernels_refuse_is_an_error(instructions: str) -> None:  # noqa: F811
    x, weight = randn(1, 2, 16392), make_weight(8, 16392, torch.bfloat16)
    with pytest.raises(InputError, match="cannot prepare these rows: rows are too long"):
        ops.linear(x, weight, norm="layer", impl="cuda_rows")


@pytest.mark.parametrize(
    ("x", "x2", "dtype", "reason"),
    [
        (randn(1, 4, 24), randn(1, 4, 12), torch.int8, r"36 channels are no multiple of 8"),
        (randn(1, 4, 20), randn(1, 4, 12), torch.int8, None),
        (randn(1, 4, 4), None, torch.int8, r"4 channels are no multiple of 8"),
        (randn(1, 4, 24), randn(1, 4, 8).bfloat16(), torch.int8, None),
        (randn(1, 4, 24), None, torch.float32, "weight is torch.float32; rows are rounded to 8 and 16 bits"),
        (randn(1, 4, 24), randn(1, 4, 8), FLOAT8, None),
        (randn(1, 4, 24).bfloat16(), None, torch.int8, None),
    ],
)
def test_why_rows_cannot_be_prepared(monkeypatch, x, x2, dtype: torch.dtype, reason: str | None) -> None:
    monkeypatch.setattr("vpd_fast._native.why_missing", lambda name: None)
    found = _prologue_cuda.refuse(x, x2, dtype)
    assert found is None if reason is None else found.startswith(reason)
