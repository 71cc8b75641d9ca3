"""Perception with text-to-image diffusion models, fast."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from vpd_fast import ops
from vpd_fast.config import BackboneConfig, VPDConfig
from vpd_fast.models import VPD

if TYPE_CHECKING:
    from types import ModuleType

__version__ = "0.1.0"
__all__ = ["VPD", "BackboneConfig", "VPDConfig", "__version__", "ops"]


def __getattr__(name: str) -> ModuleType:
    """`vpd_fast.inference` and `vpd_fast.checkpoints` are imported when first used: they need OpenCV and the like."""
    if name in ("inference", "checkpoints"):
        return importlib.import_module(f"vpd_fast.{name}")
    raise AttributeError(f"module 'vpd_fast' has no attribute {name!r}")
