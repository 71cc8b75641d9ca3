"""Triton's interpreter without what it does again and again, which is half of its time, and without a mistake.

It replaces the members of `triton.language` when a kernel starts, and again at each call of a device function, `tl.sum`
and `tl.zeros` among them: it looks through some hundred members of five classes and modules, and finds them replaced
already. For most operations it writes down a table of all types to look one up. And each value has a type and a shape
of its own, which are checked, and objects for every number in them. Every sum of integers is computed once more in 64
bits and compared with two limits, for an assertion that is made only with `debug`.

Of a number and NaN the least and the largest are the number, as GPUs and later versions have it; Triton 3.7, which
PyTorch 2.13 asks for, interprets them as NaN.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np


def mend_interpreter() -> None:
    """Changes the interpreter where it is the one described above."""
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    _prefer_numbers_to_nan(interpreter.InterpreterBuilder)
    if hasattr(interpreter, "_LangPatchScope") and not hasattr(interpreter.GridExecutor.__call__, "__wrapped__"):
        _replace_members_once_per_launch(interpreter)
    if hasattr(interpreter, "_get_np_dtype") and not hasattr(interpreter._get_np_dtype, "__wrapped__"):
        _remember_types(interpreter)
    core = interpreter.tl.core
    kind = core.block_type(core.float32, [2])
    if type(kind.shape) is core.tuple and not hasattr(core.block_type.__init__, "__wrapped__"):
        _share_shapes(core)
        _combine_equal_shapes_at_once(type(interpreter.interpreter_semantic))
        _leave_out_what_is_not_asserted(type(interpreter.interpreter_semantic))


def _prefer_numbers_to_nan(builder: type) -> None:
    builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)


def _replace_members_once_per_launch(interpreter: ModuleType) -> None:
    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    modules = {id(interpreter.tl), id(interpreter.tl.core)}
    replaced: set[int] = set()  # of a launch: the modules, by id
    launches = 0

    def replace_once(function: Callable) -> Any:
        needed = {id(value) for value in function.__globals__.values()} & modules
        if launches and needed <= replaced:
            return interpreter._LangPatchScope()
        replaced.update(needed)
        return replace(function)

    @functools.wraps(launch)
    def launch_with_one_replacement(self: Any, *arguments: Any, **options: Any) -> None:
        nonlocal launches
        launches += 1
        try:
            launch(self, *arguments, **options)
        finally:
            launches -= 1
            replaced.clear()

    interpreter._patch_lang = replace_once
    interpreter.GridExecutor.__call__ = launch_with_one_replacement


def _remember_types(interpreter: ModuleType) -> None:
    look_up = interpreter._get_np_dtype
    found: dict[str, Any] = {}  # by the name of the type of an element

    @functools.wraps(look_up)
    def numpy_type(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in found:
            found[name] = look_up(dtype)
        return found[name]

    interpreter._get_np_dtype = numpy_type


def _share_shapes(core: ModuleType) -> None:
    """Types of the same shape have the same tuple, and so have their values."""
    make_type, make_value = core.block_type.__init__, core.tensor.__init__
    number = core.constexpr
    shapes: dict[tuple, tuple[Any, int, str]] = {}  # a type's tuple, its product, how it is written
    values: dict[int, tuple[Any, Any]] = {}  # by the identity of that tuple: that of a value, its product
    scalar = object()  # stands for the tuple of what is no block

    @functools.wraps(make_type)
    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = tuple([side.value if type(side) is number else side for side in shape])
        if key not in shapes:
            make_type(self, element_ty, shape)
            shapes[key] = (self.shape, self.numel, str(self.shape))
        self.element_ty = element_ty
        self.shape, self.numel, written = shapes[key]
        self.name = f"<{written}, {element_ty}>"

    @functools.wraps(make_value)
    def tensor(self: Any, handle: Any, type: Any) -> None:
        shape = type.shape if type.is_block() else scalar
        if id(shape) not in values:
            make_value(self, handle, type)
            if shape is scalar or any(shape is shared for shared, *_ in shapes.values()):
                values[id(shape)] = (self.shape, self.numel)  # it lives as long as its identity is kept
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = values[id(shape)]

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor


def _combine_equal_shapes_at_once(semantic: type) -> None:
    """Two values of one shape, which they share, are what they are when they are combined."""
    broadcast = semantic.broadcast_impl_value

    @functools.wraps(broadcast)
    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    semantic.broadcast_impl_value = broadcast_impl_value


def _leave_out_what_is_not_asserted(semantic: type) -> None:
    """Whether integers overflow is found out only where it would be an error."""
    sanitize = semantic.binary_op_sanitize_overflow_impl

    @functools.wraps(sanitize)
    def binary_op_sanitize_overflow_impl(self: Any, lhs: Any, rhs: Any, binary_op: Callable) -> None:
        if self.builder.options.debug:
            sanitize(self, lhs, rhs, binary_op)

    semantic.binary_op_sanitize_overflow_impl = binary_op_sanitize_overflow_impl
