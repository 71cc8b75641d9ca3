"""What `linear` refuses, and why an implementation of it cannot run."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from vpd_fast.errors import InputError
from vpd_fast.ops import _gemm
from vpd_fast.ops.packing import FLOAT8, PackedWeight

from ..helpers.fake_gpu import OnGpu
from .gemm_cases import make_weight, randn
from .on_device import ops

X = torch.zeros(2, 5, 8)


WEIGHT = make_weight(6, 8, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 8)}, r"x must have shape \(B, M, K1\), got \(5, 8\)"),
        ({"x": torch.zeros(2, 0, 8)}, "x has no elements along M"),
        ({"x": X.double()}, "x must be torch.float32 or torch.bfloat16 or torch.float16, got torch.float64"),
        ({"x2": torch.zeros(2, 4, 8)}, r"x2 must have shape \(B=2, M=5, K2\), got \(2, 4, 8\)"),
        ({"x2": X}, "weight must have 16 columns as the input says, got 8"),
        ({"weight": torch.zeros(6, 8)}, "weight must be a PackedWeight, got Tensor"),
        ({"weight": make_weight(6, 9, torch.int8)}, "weight must have 8 columns as the input says, got 9"),
        ({"weight": PackedWeight.pack(torch.zeros(2, 6, 8), torch.int8)}, "weight must have one matrix, got 2"),
        (
            {"x": torch.zeros(1, 1, 65537), "weight": make_weight(1, 65537, torch.int8)},
            "weight of 8 bits must have at most 65536 columns, got 65537",
        ),
        ({"bias": torch.zeros(5)}, r"bias must have shape \(N=6\), got \(5,\)"),
        ({"bias": torch.zeros(6).bfloat16()}, "bias must be torch.float32, got torch.bfloat16"),
        ({"affine": torch.zeros(1, 2, 8)}, r"affine must have shape \(B=2, 2=2, C=8\), got \(1, 2, 8\)"),
        ({"scale": torch.zeros(6)}, r"scale must have shape \(C=8\), got \(6,\)"),
        ({"norm": "batch"}, "norm must be None or 'layer', got 'batch'"),
        ({"eps": -1.0}, "eps must be a finite number that is not negative, got -1.0"),
        ({"activation": "gelu"}, "activation must be None, 'relu', 'silu' or 'geglu', got 'gelu'"),
        (
            {"activation": "geglu", "weight": make_weight(7, 8, torch.float32)},
            "weight must have an even number of rows for geglu, got 7",
        ),
        ({"residual": torch.zeros(2, 5, 8)}, r"residual must have shape \(B=2, M=5, N=6\), got \(2, 5, 8\)"),
        ({"out_dtype": torch.int8}, "out_dtype must be None, float32, bfloat16 or float16, got torch.int8"),
        ({"out": torch.zeros(2, 5, 5)}, r"out must have shape \(B=2, M=5, N=6\), got \(2, 5, 5\)"),
        (
            {"out": torch.zeros(2, 5, 6), "out_dtype": torch.bfloat16},
            "out must be of out_dtype=torch.bfloat16, got torch.float32",
        ),
        ({"out": torch.zeros(2, 1, 6).expand(2, 5, 6)}, "out must not be expanded"),
        ({"x": X.clone().requires_grad_()}, "x requires gradients, which linear does not compute"),
        ({"bias": torch.zeros(6, device="meta")}, "bias must be on cpu as x is, got meta"),
        ({"impl": "gpu"}, "impl must be 'auto' or an implementation .* got 'gpu'"),
        ({"impl": 3}, "impl must be a string, got 3"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    arguments = {"x": X, "weight": WEIGHT, **change}
    with pytest.raises(InputError, match=message):
        ops.linear(**arguments)


def test_gradients_are_fine_where_none_are_recorded() -> None:
    x = X.clone().requires_grad_()
    with torch.no_grad():
        assert not ops.linear(x, WEIGHT).requires_grad


def test_why_an_implementation_cannot_run(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    no_gpu = dict.fromkeys(("triton", "cuda", "library", "cuda_rows"), "x is on cpu, not on a GPU")
    assert ops.explain("linear", X, WEIGHT) == {"cpu": "ok", **no_gpu, "reference": "ok"}
    weight = PackedWeight(WEIGHT.data.to("meta"), None, None, 6, 8)
    assert ops.explain("linear", X.to("meta"), weight)["cpu"] == "x is on meta, not on the CPU"


@pytest.mark.parametrize(
    ("widths", "dtype", "norm", "capability", "expected"),
    [
        ((32,), torch.float32, False, (9, 0), "tensor cores multiply 8 and 16 bits"),
        ((24,), torch.int8, False, (9, 0), "24 channels of torch.int8 are no multiple of 16 bytes"),
        ((24, 8), torch.int8, False, (9, 0), None),  # rounded and joined before
        ((24, 12), torch.bfloat16, False, (9, 0), r"24 \+ 12 channels of torch.bfloat16"),
        ((24, 12), torch.bfloat16, True, (9, 0), "36 channels of torch.bfloat16"),
        ((20, 12), torch.bfloat16, True, (8, 0), None),
        ((32,), FLOAT8, False, (8, 9), "has no wgmma"),
        ((32,), FLOAT8, False, (9, 0), None),
    ],
)
def test_why_the_cuda_kernels_cannot_run(monkeypatch, widths, dtype, norm, capability, expected) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(_gemm, "triton_refuses", lambda *_: None)
    monkeypatch.setattr("vpd_fast._native.why_missing", lambda name: None)
    kind = dtype if dtype == torch.bfloat16 else torch.float32
    x, x2 = ([randn(1, 4, width, dtype=kind).as_subclass(OnGpu) for width in widths] + [None])[:2]
    call = SimpleNamespace(x=x, x2=x2, data=torch.zeros(1, 8, sum(widths)).to(dtype), has_prologue=norm)
    reason = _gemm.cuda_refuses(call)
    assert reason is None if expected is None else re.search(expected, reason)
