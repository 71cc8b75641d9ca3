"""What all operators share: their contract with PyTorch, their implementations, and the choice between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vpd_fast.errors import InputError

LIBRARY = torch.library.Library("vpd_fast", "DEF")
_OPS: dict[str, Op] = {}


def never_refuses(*args: Any) -> None:
    """`refuse` of an implementation that runs on whatever the operator accepts."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    run: takes the operator's arguments (without `impl`) and returns its result.
    refuse: takes the same arguments; returns the reason why `run` cannot take them, or None. It must not compute.
    """

    name: str
    run: Callable[..., Any]
    refuse: Callable[..., str | None] = never_refuses


@dataclass(frozen=True)
class Op:
    """An operator `torch.ops.vpd_fast.<name>`.

    arguments, returns: as in PyTorch's operator schemas, without `impl`, which is added as the last argument. There
        are no default values (PyTorch would not hand them over); those are for the public function.
    fake: returns an empty result of the right shape, dtype and device, for tracing.
    check: takes the public function's arguments (without `impl`), raises InputError for bad ones and returns the
        operator's arguments. The public function is `check`, then the operator.
    implementations: in order of preference. The last is the plain PyTorch "reference": it defines what is correct.
    """

    name: str
    arguments: str
    returns: str
    fake: Callable[..., Any]
    check: Callable[..., tuple[Any, ...]]
    implementations: tuple[Implementation, ...]

    def __call__(self, *args: Any) -> Any:
        """Runs the operator on checked arguments, the last of which is `impl`."""
        return self.choose(args[-1], args[:-1]).run(*args[:-1])

    def choose(self, impl: str, args: tuple[Any, ...]) -> Implementation:
        """The named implementation, or for "auto" the first that does not refuse. Raises InputError if none fits."""
        if impl == "auto":
            for candidate in self.implementations:
                if candidate.refuse(*args) is None:
                    return candidate
            reasons = "; ".join(f"{i.name}: {i.refuse(*args)}" for i in self.implementations)
            raise InputError(f"no implementation of {self.name} can run here ({reasons})")
        for candidate in self.implementations:
            if candidate.name == impl:
                reason = candidate.refuse(*args)
                if reason is not None:
                    raise InputError(f"impl={impl!r} of {self.name} cannot run here: {reason}")
                return candidate
        names = ", ".join(repr(i.name) for i in self.implementations)
        raise InputError(f"impl must be 'auto' or an implementation of {self.name} ({names}), got {impl!r}")


def register(op: Op) -> Op:
    """Defines the operator in PyTorch, for all devices and for tracing; loads no native code."""
    LIBRARY.define(f"{op.name}({op.arguments}, str impl) -> {op.returns}")
    LIBRARY.impl(op.name, op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vpd_fast::{op.name}", op.fake, lib=LIBRARY)
    _announce_writes(getattr(torch.ops.vpd_fast, op.name).default)
    _OPS[op.name] = op
    return op


def _announce_writes(overload: torch._ops.OpOverload) -> None:
    """Lets autograd know of the arguments that the operator writes to, so that stale saved tensors are an error."""
    arguments = overload._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    if not written:
        return

    def run(keys: Any, *args: Any) -> Any:
        for i in written:
            if args[i] is not None:
                torch.autograd.graph.increment_version(args[i])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return overload.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)

    LIBRARY.impl(overload._schema.name.partition("::")[2], run, "ADInplaceOrView", with_keyset=True)


def registry() -> dict[str, Op]:
    """All operators of vpd_fast by name."""
    return dict(_OPS)


def explain(name: str, *args: Any, **kwargs: Any) -> dict[str, str]:
    """Says for each implementation of an operator whether it would run: "ok" or the reason why not.

    name: of the operator. args, kwargs: what its public function takes (`impl` is ignored). `impl="auto"` takes the
    first "ok". Raises InputError for an unknown operator.

        >>> vpd_fast.ops.explain("upsample_argmax", torch.zeros(1, 2, 8, 8), (16, 16))
        {'cuda': 'logits are on cpu, not on a GPU', 'cpu': 'ok', 'triton': 'logits are on cpu, not on a GPU', ...}
    """
    if name not in _OPS:
        raise InputError(f"name must be an operator of vpd_fast ({', '.join(_OPS)}), got {name!r}")
    kwargs.pop("impl", None)
    arguments = _OPS[name].check(*args, **kwargs)
    return {i.name: i.refuse(*arguments) or "ok" for i in _OPS[name].implementations}
