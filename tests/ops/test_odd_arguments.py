"""Arguments that cannot be, of every public operator: one InputError, or the right result; nothing else."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vpd_fast import ops
from vpd_fast.errors import InputError
from vpd_fast.ops import PackedWeight, Statistics

X, IMAGE = torch.randn(2, 5, 8), torch.randn(2, 4, 4, 8)
QKV = {"q": torch.randn(2, 5, 8), "k": torch.randn(2, 3, 8), "v": torch.randn(2, 3, 8), "heads": 2}
STATISTICS = Statistics(torch.zeros(2, 1, 5, 6), 16)


def packed(matrices: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> PackedWeight:
    return PackedWeight.pack(torch.randn(matrices, n, k), dtype)


# A call of every public operator with all of its tensors.
GOOD: dict[str, dict[str, Any]] = {
    "linear": {
        "x": X, "weight": packed(1, 6, 16), "bias": torch.randn(6), "x2": torch.randn(2, 5, 8), "norm": "layer",
        "affine": torch.randn(2, 2, 16), "scale": torch.randn(16), "residual": torch.randn(2, 5, 6),
        "activation": "silu", "out_dtype": torch.float32, "out": torch.zeros(2, 5, 6),
    },
    "conv2d": {
        "x": IMAGE, "weight": packed(1, 6, 144), "bias": torch.randn(6), "kernel": (3, 3), "stride": 1, "padding": 1,
        "upsample": False, "x2": torch.randn(2, 4, 4, 8), "affine": torch.randn(2, 2, 16), "silu": True,
        "scale": torch.randn(16), "residual": torch.randn(2, 4, 4, 6), "activation": "relu",
        "out_dtype": torch.float32, "out": torch.zeros(2, 4, 4, 6), "ranges": torch.randn(2, 2, 3).sort(1)[0],
        "statistics": STATISTICS,
    },
    "winograd_conv2d": {
        "x": IMAGE, "weight": packed(16, 6, 16), "bias": torch.randn(6), "x2": torch.randn(2, 4, 4, 8),
        "affine": torch.randn(2, 2, 16), "silu": True, "scale": torch.randn(16), "upsample": False,
        "residual": torch.randn(2, 4, 4, 6), "activation": "relu", "out_dtype": torch.float32,
        "out": torch.zeros(2, 4, 4, 6),
    },
    "group_norm_affine": {
        "x": IMAGE, "weight": torch.randn(16), "bias": torch.randn(16), "groups": 4, "eps": 1e-5,
        "x2": torch.randn(2, 4, 4, 8), "statistics": None, "statistics2": None, "ranges": torch.zeros(2, 2, 4),
        "silu": True, "scale": torch.randn(16),
    },
    "self_attention": {**QKV, "scale": 0.5, "out": torch.zeros(2, 5, 8)},
    "cross_attention_maps": {
        **QKV, "scale": 0.5, "categories": torch.tensor([0, 1, -1]), "num_categories": 2, "reduce": "mean",
        "map_grad": False, "need_maps": True, "average_heads": True, "weight": 1.0, "addend": torch.randn(2, 5, 2),
    },
    "cross_attention_maps_into": {
        **QKV, "into": torch.zeros(2, 5, 2), "scale": 0.5, "categories": torch.tensor([0, 1, -1]),
        "num_categories": 2, "reduce": "sum", "weight": 1.0, "accumulate": False, "addend": torch.randn(2, 5, 2),
    },
    "cross_attention_maps_backward": {
        "grad_out": torch.randn(2, 5, 8), "grad_maps": torch.randn(2, 5, 2), **QKV, "scale": 0.5,
        "categories": torch.tensor([0, 1, -1]), "num_categories": 2, "reduce": "mean", "average_heads": True,
        "weight": 1.0,
    },
    "upsample_argmax": {"logits": torch.randn(2, 3, 4, 5), "size": (7, 9), "align_corners": False},
    "upsample_argmax_windows": {
        "logits": torch.randn(1, 4, 3, 4, 4), "ys": (0, 8), "xs": (0, 8), "crop_size": (16, 16),
        "image_size": (24, 24), "size": (24, 24), "padded_size": (16, 16),
    },
    "winograd_weight": {"weight": torch.randn(2, 3, 3, 3), "taps": 16},
}  # fmt: skip
ODD_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "jagged": lambda t: torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(3, 3)], layout=torch.jagged),
    "complex": lambda t: t.to(torch.complex64),
    "conjugate": lambda t: t.to(torch.complex64).conj(),
    "no dimension": lambda t: t.flatten()[0],
    "one dimension more": lambda t: t[None],
    "quantised": lambda t: torch.quantize_per_tensor(torch.zeros(t.shape), 1.0, 0, torch.qint8),
    "list": lambda t: t.tolist(),
    "array": lambda t: t.numpy(),
    "number": lambda t: 5,
}
ODD_VALUES = [
    *(-1, 0, 1, 2**70, -(2**70), 10**400, math.nan, math.inf, True, None, "text", "", b"bytes", "\udcff", object()),
    *(
        [],
        [1],
        [2**70, 2**70],
        (),
        (1, 2, 3),
        ["a", "b"],
        [None, None],
        {"a": 1},
        {1},
        torch.float64,
        torch.device("cpu"),
    ),
    *(torch.zeros(3), torch.zeros(2, 2).to_sparse(), torch.ones(2).to("meta"), torch.zeros(()).numpy(), lambda: 1),
    *(torch.device("cpu"), torch.zeros(1).numpy(), 1j, range(2), iter([1, 2]), "x" * 10**6, [1] * 10**4),
]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def test_every_operator_is_here() -> None:
    assert set(ops.registry()) <= set(GOOD)


@pytest.mark.parametrize("name", GOOD)
def test_good_arguments(name: str) -> None:
    getattr(ops, name)(**GOOD[name])


@pytest.mark.parametrize("kind", ODD_TENSORS)
@pytest.mark.parametrize("name", GOOD)
def test_odd_tensors(name: str, kind: str) -> None:
    for argument, value in GOOD[name].items():
        if not isinstance(value, Tensor):
            continue
        try:
            odd = ODD_TENSORS[kind](value)
        except RuntimeError:  # PyTorch has no such tensor of these numbers
            continue
        if kind == "meta" and sum(isinstance(other, Tensor) for other in GOOD[name].values()) == 1:
            continue  # everything is there, so the result is, too
        if argument == "categories" and kind == "list":
            continue
        with pytest.raises(InputError, match=rf"{argument}\b|must be on meta") as error:
            getattr(ops, name)(**{**GOOD[name], argument: odd})
        assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", GOOD)
def test_odd_values(name: str) -> None:
    function = getattr(ops, name)
    for argument in inspect.signature(function).parameters:
        for value in ODD_VALUES:
            message = ""
            try:
                function(**{**GOOD[name], argument: value})
            except InputError as error:
                message = str(error)
            assert len(message) < 600, argument


@pytest.mark.parametrize("kind", ["negative view", "zero"])
@pytest.mark.parametrize("name", GOOD)
def test_views_whose_memory_has_other_numbers(name: str, kind: str) -> None:
    for argument, value in GOOD[name].items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        odd = torch._neg_view(value) if kind == "negative view" else torch._efficientzerotensor(value.shape)
        with pytest.raises(InputError, match=rf"{argument} must be a dense tensor, got .* \({kind}\)"):
            getattr(ops, name)(**{**GOOD[name], argument: odd})


# No other argument says how large these must be, and a run may be longer than what it is of.
OF_ANY_SIZE = ("logits", "ranges", "run")


def smaller(value: Any) -> list[Any]:
    """Values in the place of an argument of `torch.ops.vpd_fast`, by which a kernel would read or write elsewhere."""
    if isinstance(value, Tensor):
        shorter = [value.narrow(i, 0, value.shape[i] - 1) for i in range(value.dim()) if value.shape[i] > 1]
        return [*shorter, value[:0], value[None], value.flatten()[0], value.double()]
    if isinstance(value, bool) or not isinstance(value, int | list | tuple):
        return []
    if isinstance(value, int):
        return [value + 1, -1, 2**40]
    return [[2**40] * len(value), [-1] * len(value), list(value)[1:]]


@pytest.mark.parametrize("name", ops.registry())
def test_direct_calls_are_checked(name: str) -> None:
    """Whatever the public function would not make is refused, or PyTorch does not take it; nothing reaches a kernel."""
    op = ops.registry()[name]
    operator, flat = getattr(torch.ops.vpd_fast, name), op.flatten(op.bind(**GOOD[name]))
    operator(*flat, "auto")
    refused = 0
    for i, (argument, value) in enumerate(zip(op.arguments.__match_args__, flat, strict=True)):
        for odd in smaller(value):
            try:
                operator(*flat[:i], odd, *flat[i + 1 :], "auto")
            except (InputError, RuntimeError):
                refused += 1
            else:
                assert argument in OF_ANY_SIZE, (argument, odd)
    assert refused > 3


@pytest.mark.parametrize("name", GOOD)
def test_what_fits_is_not_described(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for a message that nobody reads: torch.compile of PyTorch 2.11 cannot follow that."""
    described: list[Any] = []
    monkeypatch.setattr("vpd_fast.errors._Brief.repr", lambda self, value: described.append(value) or "")
    with torch.no_grad():
        getattr(ops, name)(**GOOD[name])
    assert described == []


@pytest.mark.parametrize("name", ["linear", "cross_attention_maps"])
def test_compiled_code_is_checked_when_it_runs(name: str) -> None:
    """Its arguments fit, so that all that is to be seen is the same result."""
    function = getattr(ops, name)
    given = GOOD[name] | ({"out": None} if name == "linear" else {})
    tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
    others = {key: value for key, value in given.items() if key not in tensors}
    compiled = torch.compile(lambda named: function(**named, **others), fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(tensors), function(**given), strict=True):
        assert torch.equal(found, expected)
