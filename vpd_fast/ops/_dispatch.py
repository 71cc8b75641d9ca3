"""What all operators share: their contract with PyTorch, their implementations, and the choice between them.

An operator is declared in four steps, of which `linear.py` is an example:

1. `@dataclass(frozen=True) class LinearArguments`: the operator's arguments, the only list of them. The schema is
   derived from the types of its fields (`schema`); a tensor that is written to is `Annotated[Tensor, WRITTEN]`.
   `public()` says with which arguments the public function makes them.
2. `def linear(..., impl="auto")`, the public function: checks what it is given and ends with `LINEAR(arguments, impl)`.
3. Implementations, pairs of functions `run(arguments)` and `refuse(arguments)`, the plain PyTorch "reference" last.
4. `LINEAR = register(Op("linear", LinearArguments, public=linear, implementations=(...)))`.
"""

from __future__ import annotations

import functools
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

import torch
from torch import Tensor

from vpd_fast.errors import InputError, brief
from vpd_fast.ops import _choices
from vpd_fast.ops._checks import check_impl

LIBRARY = torch.library.Library("vpd_fast", "DEF")
_OPS: dict[str, Op] = {}
WRITTEN = "written"  # marks a tensor that the operator writes to
SymInt = Annotated[int, "SymInt"]  # an integer that torch.compile may leave open, such as a size
_TYPES: dict[Any, str] = {Tensor: "Tensor", int: "int", SymInt: "SymInt", float: "float", bool: "bool", str: "str"}
_TYPES |= {Sequence[kind]: f"{_TYPES[kind]}[]" for kind in (int, SymInt)}
_BIND = object()  # the `impl` with which `Op.bind` calls a public function
_calling = threading.local()  # .op: the operator whose public function, which has checked the arguments, calls it


class _Bound(Exception):  # noqa: N818
    """Ends a public function that `Op.bind` called, with the arguments that it hands over."""


def never_refuses(arguments: Any) -> None:
    """`refuse` of an implementation that runs on whatever the operator accepts."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    run: takes the operator's arguments and returns its result.
    refuse: takes the same arguments; returns the reason why `run` cannot take them, or None. It must not compute.
    """

    name: str
    run: Callable[[Any], Any]
    refuse: Callable[[Any], str | None] = never_refuses


@dataclass(frozen=True)
class Op:
    """An operator `torch.ops.vpd_fast.<name>`.

    arguments: a frozen dataclass, see the docstring of this module. PyTorch sees its fields, and `impl` after them.
        There are no default values (PyTorch would not hand them over); those are for the public function. The first
        is a tensor that is on the device where the operator runs. The method `public()` returns the arguments of a
        call of the public function, by which direct calls of the operator are checked.
    implementations: in order of preference. The last is the plain PyTorch "reference": it defines what is correct.
    public: the function `vpd_fast.ops.<name>`.
    returns: as in PyTorch's operator schemas; "()" for an operator that fills its arguments.
    fake: takes the arguments and returns an empty result of the right shape, dtype and device, for tracing.
    shape: takes the arguments; returns what decides which implementation is fastest on a GPU (`_choices.py`). Every
        call there calls it, so it must be cheap. None: the order of the list decides.
    measured_as: the operator whose times count; "": its own.
    """

    name: str
    arguments: type
    implementations: tuple[Implementation, ...]
    public: Callable[..., Any]
    returns: str = "()"
    fake: Callable[[Any], Any] = lambda _: None
    shape: Callable[[Any], _choices.Shape] | None = None
    measured_as: str = ""

    def __call__(self, arguments: Any, impl: str) -> Any:
        """Runs the operator on checked arguments; for public functions. Raises InputError if `impl` is no name."""
        if impl is _BIND:
            raise _Bound(arguments)
        operator = getattr(torch.ops.vpd_fast, self.name)
        if torch.compiler.is_compiling():  # what is compiled calls the operator itself
            return operator(*self.flatten(arguments), check_impl(impl))
        _calling.op = self
        try:
            return operator(*self.flatten(arguments), check_impl(impl))
        finally:
            _calling.op = None

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """The arguments that a call of the public function makes; only its checks run."""
        try:
            self.public(*args, **{**kwargs, "impl": _BIND})
        except _Bound as bound:
            return bound.args[0]
        raise AssertionError(f"the public function of {self.name} does not call its operator")

    def flatten(self, arguments: Any) -> list[Any]:
        """The fields of the arguments, which is what PyTorch takes."""
        return [getattr(arguments, name) for name in self.arguments.__match_args__]

    def run(self, *flat: Any) -> Any:
        """What PyTorch calls: chooses the implementation that the last argument, `impl`, names, and runs it."""
        arguments = self.arguments(*flat[:-1])
        checked, _calling.op = getattr(_calling, "op", None), None
        if checked is not self:  # torch.ops.vpd_fast, or compiled code, was called
            self.check(arguments)
        return self.choose(flat[-1], arguments).run(arguments)

    def check(self, arguments: Any) -> None:
        """Raises InputError unless a call of the public function makes these arguments: kernels rely on its checks."""
        try:
            values = arguments.public()
        except IndexError as error:
            raise InputError(f"{self.name}: a tensor has too few dimensions ({error})") from error
        made = self.bind(**values)
        for name in self.arguments.__match_args__:
            given, expected = getattr(arguments, name), getattr(made, name)
            if not isinstance(expected, Tensor) and given is not expected:
                given, expected = (
                    list(v) if isinstance(v, Sequence) and not isinstance(v, str) else v for v in (given, expected)
                )
                if given != expected:
                    raise InputError(f"{name} of {self.name} must be {brief(expected)} here, got {brief(given)}")

    def run_fake(self, *flat: Any) -> Any:
        """What PyTorch calls while it traces."""
        return self.fake(self.arguments(*flat[:-1]))

    @functools.cached_property
    def by_name(self) -> dict[str, Implementation]:
        """The implementations by name, in order of preference."""
        return {implementation.name: implementation for implementation in self.implementations}

    @functools.cached_property
    def _by_list(self) -> _choices.Order:
        return _choices.Order(tuple(self.by_name), _choices.BY_LIST)

    def order(self, arguments: Any) -> _choices.Order:
        """The order in which "auto" asks the implementations, and what says so: a table of times, or the list."""
        if self.shape is None:
            return self._by_list
        tensor = getattr(arguments, self.arguments.__match_args__[0])
        if not tensor.is_cuda:
            return self._by_list
        names = self._by_list.names
        return _choices.order(self.measured_as or self.name, names, tensor.device, self.shape(arguments))

    def choose(self, impl: str, arguments: Any) -> Implementation:
        """The named implementation, or for "auto" the first that does not refuse. Raises InputError if none fits."""
        if impl == "auto":
            for name in self.order(arguments).names:
                candidate = self.by_name[name]
                if candidate.refuse(arguments) is None:
                    return candidate
            reasons = "; ".join(f"{i.name}: {i.refuse(arguments)}" for i in self.implementations)
            raise InputError(f"no implementation of {self.name} can run here ({reasons})")
        if impl in self.by_name:
            reason = self.by_name[impl].refuse(arguments)
            if reason is not None:
                raise InputError(f"impl={impl!r} of {self.name} cannot run here: {reason}")
            return self.by_name[impl]
        names = ", ".join(repr(i.name) for i in self.implementations)
        raise InputError(f"impl must be 'auto' or an implementation of {self.name} ({names}), got {brief(impl)}")


def schema(arguments: type) -> str:
    """The fields of a dataclass as arguments of a PyTorch operator.

    >>> @dataclass(frozen=True)
    ... class Arguments:
    ...     x: Tensor
    ...     sizes: Sequence[SymInt]
    ...     out: Annotated[Tensor | None, WRITTEN]
    >>> schema(Arguments)
    'Tensor x, SymInt[] sizes, Tensor(a!)? out'
    """
    letters = iter("abcdefgh")
    types = typing.get_type_hints(arguments, include_extras=True)
    return ", ".join(f"{_schema_type(types[field.name], letters)} {field.name}" for field in fields(arguments))


def _schema_type(kind: Any, letters: Iterator[str]) -> str:
    written = typing.get_origin(kind) is Annotated and WRITTEN in kind.__metadata__
    kind = typing.get_args(kind)[0] if written else kind
    optional = type(None) in typing.get_args(kind)
    if optional:
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    return _TYPES[kind] + (f"({next(letters)}!)" if written else "") + ("?" if optional else "")


def register(op: Op) -> Op:
    """Defines the operator in PyTorch, for all devices and for tracing; loads no native code."""
    LIBRARY.define(f"{op.name}({schema(op.arguments)}, str impl) -> {op.returns}")
    LIBRARY.impl(op.name, op.run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vpd_fast::{op.name}", op.run_fake, lib=LIBRARY)
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


class Explanation(dict[str, str]):
    """Implementations in the order in which "auto" asks them, each with "ok" or the reason why it would not run.

    by: what says the order, in words: the table of the GPU and its entry, or the order of the list and why no table
    decides.
    """

    def __init__(self, reasons: dict[str, str], by: str) -> None:
        super().__init__(reasons)
        self.by = by

    @property
    def auto(self) -> str | None:
        """The name of the implementation that "auto" takes, None if all refuse."""
        return next((name for name, reason in self.items() if reason == "ok"), None)

    def __repr__(self) -> str:
        return f"<auto: {self.auto}, by {self.by}; {super().__repr__()}>"


def explain(name: str, *args: Any, **kwargs: Any) -> Explanation:
    """Says for each implementation of an operator whether it would run, which one "auto" takes, and what says so.

    name: of the operator. args, kwargs: what its public function takes (`impl` is ignored). Returns a dict with "ok" or
    the reason why not for each implementation, of which `impl="auto"` takes the first "ok"; its `auto` is the name of
    that one, and its `by` tells whether a table of measurements decided, or the order of the list. Raises InputError
    for an unknown operator.

        >>> vpd_fast.ops.explain("upsample_argmax", torch.zeros(1, 2, 8, 8), (16, 16))
        <auto: cpu, by the order of the list; {'cuda': 'logits are on cpu, not on a GPU', 'cpu': 'ok', ...}>
    """
    if not isinstance(name, str) or name not in _OPS:
        raise InputError(f"name must be an operator of vpd_fast ({', '.join(_OPS)}), got {brief(name)}")
    kwargs.pop("impl", None)
    op = _OPS[name]
    arguments = op.bind(*args, **kwargs)
    names, by = op.order(arguments)
    return Explanation({name: op.by_name[name].refuse(arguments) or "ok" for name in names}, by)
