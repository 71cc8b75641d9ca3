"""The choice between implementations, the shared checks, and that every operator is complete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import torch
from torch import Tensor

from vpd_fast import ops
from vpd_fast.errors import InputError
from vpd_fast.ops._checks import check_size, check_tensor
from vpd_fast.ops._dispatch import WRITTEN, Implementation, Op, SymInt, schema

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Example:
    x: Tensor
    sizes: Sequence[SymInt]
    count: int | None
    total: Annotated[Tensor, WRITTEN]
    out: Annotated[Tensor | None, WRITTEN]


def test_schema() -> None:
    assert schema(Example) == "Tensor x, SymInt[] sizes, int? count, Tensor(a!) total, Tensor(b!)? out"


@dataclass(frozen=True)
class Single:
    x: str

    def public(self) -> dict[str, str]:
        return {"x": self.x}


def make_op(*refusals: str | None) -> Op:
    implementations = tuple(
        Implementation(f"impl{i}", run=lambda a, i=i: (i, a.x), refuse=lambda a, reason=reason: reason)
        for i, reason in enumerate(refusals)
    )
    op = Op("example", Single, implementations, public=lambda x, impl: op(Single(x), impl))
    return op


def test_auto_takes_the_first_that_does_not_refuse() -> None:
    assert make_op(None, None).run("x", "auto") == (0, "x")
    assert make_op("no", None, None).run("x", "auto") == (1, "x")


def test_auto_says_every_reason_when_all_refuse() -> None:
    with pytest.raises(
        InputError, match=r"no implementation of example can run here \(impl0: too old; impl1: too new\)"
    ):
        make_op("too old", "too new").run("x", "auto")


def test_an_explicit_choice_never_falls_back() -> None:
    op = make_op("too old", None)
    assert op.run("x", "impl1") == (1, "x")
    with pytest.raises(InputError, match="impl='impl0' of example cannot run here: too old"):
        op.run("x", "impl0")
    with pytest.raises(InputError, match=r"an implementation of example \('impl0', 'impl1'\), got 'other'"):
        op.run("x", "other")


def test_explain(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reasons = ops.explain("upsample_argmax", torch.zeros(1, 2, 4, 4), (8, 8), impl="cuda")
    assert reasons == {
        **{"cuda": "logits are on cpu, not on a GPU", "cpu": "ok", "triton": "logits is on cpu, not on a GPU"},
        **{"cuda_strips": "logits are on cpu, not on a GPU", "reference": "ok"},
    }
    assert ops.explain("upsample_argmax", torch.zeros(1, 2, 4, 4, device="meta"), (8, 8))["cpu"] == (
        "logits are on meta, not on the CPU"
    )
    with pytest.raises(InputError, match="name must be an operator of vpd_fast .*upsample_argmax.* got 'nothing'"):
        ops.explain("nothing")
    with pytest.raises(InputError, match="size must be"):
        ops.explain("upsample_argmax", torch.zeros(1, 2, 4, 4), (0, 8))


def test_a_native_module_that_is_missing_is_a_reason(monkeypatch) -> None:
    monkeypatch.setattr("vpd_fast._native.why_missing", lambda name: f"{name} is not built")
    logits = torch.zeros(1, 2, 4, 4)
    assert ops.explain("upsample_argmax", logits, (8, 8))["cpu"] == "_C is not built"
    assert ops.upsample_argmax(logits, (8, 8)).shape == (1, 8, 8)  # by the reference
    with pytest.raises(InputError, match="impl='cpu' of upsample_argmax cannot run here: _C is not built"):
        ops.upsample_argmax(logits, (8, 8), impl="cpu")


def defined_in_torch() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.partition("::")[2].partition(".")[0] for name in names if name.startswith("vpd_fast::")}


@pytest.mark.parametrize("name", sorted(defined_in_torch()))
def test_every_operator_has_its_rooms(name: str) -> None:
    """A public function, a reference that never refuses, an opcheck test, a compile test and a benchmark."""
    op = ops.registry()[name]
    assert callable(getattr(ops, name))
    assert op.implementations[-1].name == "reference"
    tests = (ROOT / "tests" / "ops" / f"test_{name}.py").read_text()
    assert f"opcheck(torch.ops.vpd_fast.{name}.default" in tests
    assert "fullgraph=True" in tests
    benchmarks = "\n".join(path.read_text() for path in (ROOT / "benchmarks").glob("test_*.py"))
    assert f"{name}(" in benchmarks


def test_check_tensor_accepts() -> None:
    check_tensor("x", torch.zeros(2, 3), "B C")
    check_tensor("x", torch.zeros(0, 3), "B C", may_be_empty="B", C=3)
    check_tensor("x", torch.zeros(2, dtype=torch.int32), "n", dtypes=(torch.int32,))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"x must be a tensor of shape \(B, C=3\), got NoneType"),
        (torch.zeros(2), r"x must have shape \(B, C=3\), got \(2,\)"),
        (torch.zeros(2, 4), r"x must have shape \(B, C=3\), got \(2, 4\)"),
        (torch.zeros(0, 3), r"x has no elements along B"),
        (torch.zeros(2, 3).int(), "x must be torch.float32 or torch.bfloat16 or torch.float16, got torch.int32"),
    ],
)
def test_check_tensor_refuses(value, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_tensor("x", value, "B C", C=3)


def test_check_size() -> None:
    assert check_size("size", [3, 4]) == (3, 4)
    for bad in (None, 3, (3,), (3, 4, 5), (True, 4), ("3", 4), (3, 0), (3.0, 4)):
        with pytest.raises(InputError, match="size must be"):
            check_size("size", bad)
