"""Perception with text-to-image diffusion models, fast."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vpd_fast import _startup

_startup.prepare()  # before PyTorch is imported

from vpd_fast import _deprecated, forks, ops  # noqa: E402
from vpd_fast.config import BackboneConfig, VPDConfig  # noqa: E402
from vpd_fast.models import VPD  # noqa: E402

if TYPE_CHECKING:
    from vpd_fast.engine import load_engine, optimize
    from vpd_fast.interop.original import accelerate, restore

__version__ = "0.1.0"
__all__ = [
    "VPD", "BackboneConfig", "VPDConfig", "__version__", "accelerate", "load_engine", "ops", "optimize", "restore",
]  # fmt: skip

_deprecated.install()
forks.install()

_MODULES = ("checkpoints", "engine", "inference")
_NAMES = {
    "accelerate": "interop.original", "load_engine": "engine", "optimize": "engine", "restore": "interop.original",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """What needs OpenCV and the like is imported when first used."""
    if name in _MODULES:
        return importlib.import_module(f"vpd_fast.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"vpd_fast.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'vpd_fast' has no attribute {name!r}")
