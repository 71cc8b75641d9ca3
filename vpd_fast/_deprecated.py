"""Modules that have moved: their old names still import, with a DeprecationWarning, and nothing is loaded before."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Old module -> the modules that have its names now. Submodules of an old name move along with it.
MOVED: dict[str, tuple[str, ...]] = {
    "vpd_fast.training.sharding": ("vpd_fast.training.parallel",),
    "vpd_fast.benchmark": ("vpd_fast.bench",),
    "vpd_fast.inference.images": ("vpd_fast.pictures.resizing", "vpd_fast.pictures.reading"),
    "vpd_fast.inference.drawing": ("vpd_fast.pictures.canvas",),
    "vpd_fast.inference.palette": ("vpd_fast.pictures.palette",),
    "vpd_fast.checkpoints.bundled": ("vpd_fast.bundled", "vpd_fast.checkpoints.save", "vpd_fast.checkpoints.formats"),
    "vpd_fast.ops._packing": ("vpd_fast.ops.packing",),
    "vpd_fast.ops._statistics": ("vpd_fast.ops.statistics",),
    "vpd_fast.inference.shards": (
        "vpd_fast.inference.listing",
        "vpd_fast.inference.records",
        "vpd_fast.inference.predict_images",
    ),
}


class _MovedModules(MetaPathFinder, Loader):
    """Makes a module under an old name, with the contents of the new ones."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of an old name; None for every other one."""
        return ModuleSpec(fullname, self, is_package=True) if _new_names(fullname) else None

    def exec_module(self, module: ModuleType) -> None:
        """Import the new modules and take over their names. Raises ImportError where one is missing."""
        new_names = _new_names(module.__name__)
        message = f"{module.__name__} has moved to {' and '.join(new_names)}; the old name will be removed"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        for name in new_names:
            contents = vars(importlib.import_module(name))
            vars(module).update({key: value for key, value in contents.items() if not key.startswith("__")})


def _new_names(name: str) -> tuple[str, ...]:
    """The modules that an old name stands for, () for a name that is not old."""
    for old, new in MOVED.items():
        if name == old or name.startswith(f"{old}."):
            return tuple(module + name[len(old) :] for module in new)
    return ()


def install() -> None:
    """Let the old names be imported, before a file that an older version left behind. Again, it changes nothing."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, _MovedModules())
