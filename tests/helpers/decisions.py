"""Which cases an implementation takes, found out before anything is computed: the operators themselves are asked.

A case's function runs with tensors that say they are on a GPU where they would be. Where it calls an operator with
`impl`, that implementation's `refuse` is asked, as `vpd_fast.ops.explain` does it, and a result without values is
returned. The function gets as far as nothing checks those.

Collection leaves out the cases whose first call would be refused (`leave_out_refused`), so that every implementation
runs exactly what it takes; tests/ops/test_gpu_decisions.py has the refusals that are expected.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vpd_fast.ops._dispatch import Op
from vpd_fast.ops.packing import PackedWeight

from .fake_gpu import PretendedGpu

DECIDED = ("triton", "cuda", "cuda_rows", "cuda_strips", "wgmma")  # implementations that refuse by more than the device
NAMED_BY = ("impl", "where", "product", "name", "kernels")  # parameters
LARGE = 1 << 14  # elements
REASONS = pytest.StashKey[list]()  # of a case that was asked


class _Decided(BaseException):
    """Ends a case that is decided."""


def reasons(item: pytest.Item, first_only: bool) -> list[str | None]:
    """Why calls of a case would be refused, or None: of the first, or, if that is taken, of all that are reached.

    Of large tensors only the first, so that this does not take long.
    """
    found: list[str | None] = []

    def call(op: Op, arguments: Any, impl: str) -> Any:
        if impl in DECIDED:
            reason = next(i for i in op.implementations if i.name == impl).refuse(arguments)
            found.append(None if reason is None else f"impl={impl!r} of {op.name}: {reason}")
            large = any(isinstance(x, torch.Tensor) and x.numel() > LARGE for x in vars(arguments).values())
            if first_only or large or found[0] is not None:
                raise _Decided
        return op.fake(arguments)

    with _fixtures(item) as arguments, PretendedGpu(), _called(call):
        try:
            item.obj(**arguments())
        except (_Decided, Exception):  # noqa: S110 - such as an assertion about the values
            pass
        except BaseException as outcome:
            if not isinstance(outcome, pytest.skip.Exception):
                raise
    return found


@contextmanager
def _called(call: Callable[[Op, Any, str], Any]) -> Iterator[None]:
    """Operators are called by that function."""
    original = Op.__call__

    def replaced(op: Op, arguments: Any, impl: str) -> Any:
        return call(op, arguments, impl) if isinstance(impl, str) else original(op, arguments, impl)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Op, "__call__", replaced)
        patch.setattr(PackedWeight, "pack", _packed)
        yield


_pack, _weights = PackedWeight.pack, {}


def _packed(weight: torch.Tensor, dtype: torch.dtype, *others: Any) -> PackedWeight:
    """A weight of the right shape, packed once, because its values do not matter."""
    key = (*weight.shape, dtype, weight.device, *others)
    if key not in _weights:
        _weights[key] = _pack(weight, dtype, *others)
    return _weights[key]


@contextmanager
def _fixtures(item: pytest.Item) -> Iterator[Callable[[], dict[str, Any]]]:
    """What makes the function's arguments: parameters, and simple fixtures that are functions of parameters."""
    params, definitions = item.callspec.params, item._fixtureinfo.name2fixturedefs
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        values: dict[str, Any] = {"monkeypatch": patch}

        def value(name: str) -> Any:
            if name in values:
                return values[name]
            function = definitions[name][-1].func if name in definitions else None
            if function is None or function.__module__.startswith("_pytest"):  # a parameter, not a fixture
                values[name] = params[name]
                return values[name]
            names = inspect.signature(function).parameters
            request = SimpleNamespace(param=params.get(name), getfixturevalue=value, node=item)
            made = function(**{other: request if other == "request" else value(other) for other in names})
            if inspect.isgenerator(made):
                stack.callback(made.close)
                made = next(made)
            values[name] = made
            return made

        yield lambda: {name: value(name) for name in inspect.signature(item.obj).parameters}


def implementations_of(item: pytest.Item) -> set[str]:
    """Those of DECIDED that the parameters of a case name, alone or before something else."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    values = [params[name] for name in NAMED_BY if name in params]
    names = [value[0] if isinstance(value, tuple) else value for value in values]
    return {name.partition(":")[0] for name in names if isinstance(name, str)} & set(DECIDED)


def leave_out_refused(config: pytest.Config, items: list[pytest.Item], first_only: bool = True) -> None:
    """Takes the cases out of `items` whose first call their implementation would refuse."""
    able, refused = torch.cuda.is_available(), set()
    for item in items:
        # Elsewhere tests marked gpu are skipped, and the others interpreted.
        asked = REASONS in item.stash
        if not asked and implementations_of(item) and (able or "gpu" not in item.keywords):
            item.stash[REASONS] = reasons(item, first_only)
            if item.stash[REASONS][:1] not in ([], [None]):
                refused.add(item)
    if refused:
        config.hook.pytest_deselected(items=[item for item in items if item in refused])
        items[:] = [item for item in items if item not in refused]
