"""mmsegmentation without the compiled operators of mmcv, where mmcv-lite is installed.

Whatever is asked of mmseg's registries imports mmseg.utils, which imports mmcv.ops for a single sampling function, and
mmcv.ops wants the extension `mmcv._ext`. mmcv-lite has none, and for current PyTorch mmcv has no wheels with it. VPD
calls no operator of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NoReturn

from vpd_fast.errors import MissingDependencyError

EXTENSION = "mmcv._ext"


class _MissingOperators(ModuleType):
    """The extension's place: each of its operators is a function that raises MissingDependencyError."""

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)

        def operator(*args: Any, **kwargs: Any) -> NoReturn:
            raise MissingDependencyError(
                f"{name} is an operator of full mmcv, and mmcv-lite is installed: VPDSegmentor needs no such operator, "
                "what calls it does; compile mmcv 2.1 for the installed PyTorch in place of mmcv-lite"
            )

        return operator


def fill_in_for_operators() -> bool:
    """Let `mmcv.ops` be imported without its extension; return whether that was needed. Full mmcv is left alone.

    Importing the extension then gives operators that raise MissingDependencyError when called, while
    `mmcv.utils.ext_loader.check_ops_exist()` still says that there are none. Raises ImportError without any mmcv.
    """
    if find_spec(EXTENSION) is not None:
        return False
    module = _MissingOperators(EXTENSION, "Stands for the compiled operators of mmcv, which mmcv-lite does not have.")
    module.__spec__ = ModuleSpec(EXTENSION, loader=None)
    sys.modules[EXTENSION] = module
    return True
