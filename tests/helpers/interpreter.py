"""Triton's interpreter without what it does again for every call of a device function.

The interpreter replaces the members of `triton.language` when a kernel starts. It does so again at each call of a
device function, `tl.sum` and `tl.zeros` among them: it looks through some hundred members of five classes and modules,
finds them replaced already, and that is most of its time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any


def patch_language_once_per_launch() -> None:
    """Lets the interpreter, if it is the one described above, replace members once per launch of a kernel."""
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    scope = getattr(interpreter, "_LangPatchScope", None)
    if scope is None or hasattr(interpreter.GridExecutor.__call__, "__wrapped__"):
        return
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    modules = {id(interpreter.tl), id(interpreter.tl.core)}
    replaced: set[int] = set()  # of a launch: the modules, by id
    launches = 0

    def patch_once(function: Callable) -> Any:
        needed = {id(value) for value in function.__globals__.values()} & modules
        if launches and needed <= replaced:
            return scope()
        replaced.update(needed)
        return patch(function)

    def launch_once(self: Any, *arguments: Any, **options: Any) -> None:
        nonlocal launches
        launches += 1
        try:
            launch(self, *arguments, **options)
        finally:
            launches -= 1
            replaced.clear()

    launch_once.__wrapped__ = launch
    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_once
