"""The fast form of a model: exact rewrites, fused layers, and fewer bits."""

from vpd_fast.engine.model import FastVPD
from vpd_fast.engine.optimize import FastEncoder, fast_unet, optimize
from vpd_fast.engine.policy import Policy
from vpd_fast.engine.report import EngineReport
from vpd_fast.engine.storage import load_engine

__all__ = ["EngineReport", "FastEncoder", "FastVPD", "Policy", "fast_unet", "load_engine", "optimize"]
