"""Perception with text-to-image diffusion models, fast."""

from vpd_fast import ops
from vpd_fast.config import BackboneConfig, VPDConfig
from vpd_fast.models import VPD

__version__ = "0.1.0"
__all__ = ["VPD", "BackboneConfig", "VPDConfig", "__version__", "ops"]
