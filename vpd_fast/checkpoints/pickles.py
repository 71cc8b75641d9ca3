"""Reads pickles as data: an interpreter for the pickle language that never imports, calls or sets anything.

`pickle.Unpickler` runs whatever callables a file names. Here each opcode only moves plain values on a stack; a call is
looked up in a short table of constructors (containers, tensors) and everything else becomes an inert `Placeholder`.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from vpd_fast.checkpoints import limits

_MARK = object()


class PickleError(ValueError):
    """The stream is not a well-formed pickle, or needs a feature that no checkpoint uses."""


@dataclass(eq=False, slots=True)
class Global:
    """A class or function the pickle refers to, by name only."""

    name: str

    def __repr__(self) -> str:
        return f"Global({self.name})"


@dataclass(eq=False, slots=True)
class Placeholder:
    """Stands for an object of a class that is not rebuilt. It keeps what was stored and does nothing."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"Placeholder({self.name})"


@dataclass(eq=False)
class Unpickled:
    """Result of `load`: the object, and the names of classes and functions that became placeholders."""

    value: Any
    placeholders: set[str]


@dataclass
class Budget:
    """What the pickles of one file have used of `limits`; each method raises PickleError beyond one."""

    opcodes: int = 0
    tensors: int = 0
    copies: int = 0
    tuple_keys: int = 0

    def use(self, what: str, count: int, most: int) -> None:
        """Count something that a file may have only so often."""
        used = getattr(self, what) + count
        setattr(self, what, used)
        if used > most:
            raise PickleError(f"more than {most} {what.replace('_', ' ')}; expected a checkpoint")

    def key(self, key: Any) -> None:
        """Look at the key of a dictionary, whose hash must not take long or be like those of many others."""
        if isinstance(key, int) and not -limits.MAX_KEY < key < limits.MAX_KEY:
            raise PickleError("an int that large is the key of a dictionary")
        if not isinstance(key, tuple):
            return
        self.use("tuple_keys", 1, limits.MAX_TUPLE_KEYS)
        layer, items = [key], 0
        for _ in range(limits.MAX_KEY_DEPTH):
            items += sum(len(item) for item in layer)
            if items > limits.MAX_KEY_ITEMS:
                raise PickleError(f"a dictionary key of more than {limits.MAX_KEY_ITEMS} items")
            layer = [item for inner in layer for item in inner if isinstance(item, tuple)]
        if layer:
            raise PickleError("dictionary key nested too deeply")


Constructor = Callable[..., Any]


def _ordered_dict(budget: Budget, items: Any = ()) -> dict[Any, Any]:
    if not isinstance(items, (list, tuple)):
        raise PickleError("OrderedDict with unexpected arguments")
    budget.use("copies", 2 * len(items), limits.MAX_COPIES)
    result: dict[Any, Any] = {}
    for pair in items:
        key, value = pair
        budget.key(key)
        result[key] = value
    return result


def _sequence(budget: Budget, items: Any = ()) -> list[Any]:
    if not isinstance(items, (list, tuple)):
        return []
    budget.use("copies", len(items), limits.MAX_COPIES)
    return list(items)


CONTAINERS: dict[str, Constructor] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": lambda *_: {},
    "collections.Counter": lambda *_: {},
    "builtins.set": _sequence,  # sets become lists: their members may be placeholders
    "builtins.frozenset": _sequence,
    "torch.Size": lambda budget, items=(): tuple(_sequence(budget, items)),
}


def load(
    stream: IO[bytes],
    persistent_load: Callable[[Any], Any],
    constructors: Mapping[str, Constructor] | None = None,
    names: Container[str] = (),
    budget: Budget | None = None,
) -> Unpickled:
    """Read one pickle from `stream`, leaving it just behind the pickle.

    persistent_load(pid): what a persistent id stands for. constructors: {"module.name": function of the budget and the
    call's arguments} added to CONTAINERS; they must be safe for any arguments. names: globals understood without being
    called. budget: shared by the pickles of a file.
    Raises PickleError, or ValueError, TypeError, KeyError and IndexError for malformed streams.
    """
    budget = budget or Budget()
    machine = _Machine(persistent_load, {**CONTAINERS, **(constructors or {})}, names, budget)
    for opcode, argument, _ in pickletools.genops(stream):
        budget.opcodes += 1
        if budget.opcodes > limits.MAX_OPCODES:
            raise PickleError(f"a pickle of more than {limits.MAX_OPCODES} instructions; expected a checkpoint")
        machine.step(opcode.name, argument)
    return Unpickled(machine.pop(), machine.placeholders)


def _name(value: Any) -> str:
    return value.name if isinstance(value, (Global, Placeholder)) else type(value).__name__


# Opcodes that only push the value that follows them.
_LITERALS = frozenset(
    """
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES
    BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
    """.split()  # noqa: SIM905
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
# Functions that only wrap another call: (function, arguments) of that call.
_WRAPPERS: dict[str, Callable[[tuple[Any, ...]], tuple[Any, Any]]] = {
    "copyreg._reconstructor": lambda args: (args[0], args[1:]),
    "copy_reg._reconstructor": lambda args: (args[0], args[1:]),
    "torch._tensor._rebuild_from_type_v2": lambda args: (args[0], args[2]),  # drops the tensor's attributes
}
_IGNORED = frozenset({"PROTO", "FRAME", "STOP"})


class _Machine:
    def __init__(
        self,
        persistent_load: Callable[[Any], Any],
        constructors: Mapping[str, Constructor],
        names: Container[str],
        budget: Budget,
    ) -> None:
        self.budget = budget
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.placeholders: set[str] = set()
        self.persistent_load = persistent_load
        self.constructors = constructors
        self.names = names

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise PickleError("unexpected mark on the stack")
        return value

    def pop_to_mark(self) -> list[Any]:
        for start in range(len(self.stack) - 1, -1, -1):
            if self.stack[start] is _MARK:
                items = self.stack[start + 1 :]
                del self.stack[start:]
                return items
        raise PickleError("no mark on the stack")

    def step(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name not in _IGNORED:
            operation = getattr(self, f"op_{name}", None)
            if operation is None:
                raise PickleError(f"pickle opcode {name} does not occur in checkpoints")
            operation(argument)

    def call(self, function: Any, args: Any) -> Any:
        """What REDUCE, NEWOBJ and the like do in a real unpickler; here it is a table look-up."""
        if isinstance(args, (tuple, list)):
            self.budget.use("copies", len(args), limits.MAX_COPIES)
            args = tuple(args)
        else:
            args = (args,)
        if isinstance(function, Global):
            constructor = self.constructors.get(function.name)
            if constructor is not None:
                return constructor(self.budget, *args)
            wrapped = _WRAPPERS.get(function.name)
            if wrapped is not None:
                function, args = wrapped(args)
                return self.call(function, args)
        return Placeholder(_name(function), args)

    def refer(self, name: str) -> None:
        if len(name) > limits.MAX_NAME:
            raise PickleError(f"a class whose name has {len(name)} characters")
        if name not in self.constructors and name not in self.names and name not in _WRAPPERS:
            self.placeholders.add(name)
        self.stack.append(Global(name))

    # stack
    def op_MARK(self, _: None) -> None:
        self.stack.append(_MARK)

    def op_POP(self, _: None) -> None:
        self.stack.pop()

    def op_POP_MARK(self, _: None) -> None:
        self.pop_to_mark()

    def op_DUP(self, _: None) -> None:
        self.stack.append(self.stack[-1])

    # memo
    def op_MEMOIZE(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def op_PUT(self, index: int) -> None:
        if not 0 <= int(index) < limits.MAX_MEMO:
            raise PickleError("an object of the pickle has too large a number")
        self.memo[int(index)] = self.stack[-1]

    def op_GET(self, index: int) -> None:
        self.stack.append(self.memo[int(index)])

    op_BINPUT = op_LONG_BINPUT = op_PUT
    op_BINGET = op_LONG_BINGET = op_GET

    # containers
    def op_LIST(self, _: None) -> None:
        self.stack.append(self.pop_to_mark())

    op_FROZENSET = op_LIST

    def op_TUPLE(self, _: None) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def op_TUPLE1(self, _: None) -> None:
        self.stack.append((self.pop(),))

    def op_TUPLE2(self, _: None) -> None:
        b, a = self.pop(), self.pop()
        self.stack.append((a, b))

    def op_TUPLE3(self, _: None) -> None:
        c, b, a = self.pop(), self.pop(), self.pop()
        self.stack.append((a, b, c))

    def op_DICT(self, _: None) -> None:
        items = self.pop_to_mark()
        self.stack.append({})
        self.set_items(items)

    def op_APPEND(self, _: None) -> None:
        self.extend([self.pop()])

    def op_APPENDS(self, _: None) -> None:
        self.extend(self.pop_to_mark())

    op_ADDITEMS = op_APPENDS

    def op_SETITEM(self, _: None) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def op_SETITEMS(self, _: None) -> None:
        self.set_items(self.pop_to_mark())

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            target = target.items
        if not isinstance(target, list):
            raise PickleError(f"cannot append to {_name(target)}")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if len(items) % 2:
            raise PickleError("odd number of dictionary entries")
        if isinstance(target, Placeholder):
            target.items.extend(zip(items[::2], items[1::2], strict=True))
            return
        if not isinstance(target, dict):
            raise PickleError(f"cannot set items of {_name(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.budget.key(key)
            target[key] = value

    # objects
    def op_GLOBAL(self, argument: str) -> None:
        self.refer(".".join(argument.split(" ", 1)).replace("__builtin__.", "builtins."))

    def op_STACK_GLOBAL(self, _: None) -> None:
        name, module = self.pop(), self.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise PickleError("a global's name must be text")
        self.refer(f"{module}.{name}")

    def op_REDUCE(self, _: None) -> None:
        args, function = self.pop(), self.pop()
        self.stack.append(self.call(function, args))

    op_NEWOBJ = op_REDUCE

    def op_NEWOBJ_EX(self, _: None) -> None:
        kwargs, args, cls = self.pop(), self.pop(), self.pop()
        self.stack.append(Placeholder(_name(cls), (args, kwargs)))

    def op_OBJ(self, _: None) -> None:
        cls, *args = self.pop_to_mark()
        self.stack.append(self.call(cls, args))

    def op_INST(self, argument: str) -> None:
        args = self.pop_to_mark()
        self.op_GLOBAL(argument)
        self.stack.append(self.call(self.pop(), args))

    def op_BUILD(self, _: None) -> None:
        state = self.pop()
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            target.state = state  # attributes of containers and tensors are dropped

    def op_PERSID(self, argument: str) -> None:
        self.stack.append(self.persistent_load(argument))

    def op_BINPERSID(self, _: None) -> None:
        self.stack.append(self.persistent_load(self.pop()))
