"""Triton's interpreter without what it does again and again, which is a third of its time.

It replaces the members of `triton.language` when a kernel starts, and again at each call of a device function, `tl.sum`
and `tl.zeros` among them: it looks through some hundred members of five classes and modules, and finds them replaced
already. And for most operations it writes down a table of all types to look one up.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any


def make_interpreter_faster() -> None:
    """Changes the interpreter, if it is the one described above; results are the same."""
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    if hasattr(interpreter, "_LangPatchScope") and not hasattr(interpreter.GridExecutor.__call__, "__wrapped__"):
        _replace_members_once_per_launch(interpreter)
    if hasattr(interpreter, "_get_np_dtype") and not hasattr(interpreter._get_np_dtype, "__wrapped__"):
        _remember_types(interpreter)


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
