"""Plain PyTorch models: the specification, the baseline every speed-up is measured against, and what trains."""

from vpd_fast.models.vpd import VPD, VPDDepth, VPDReferring, VPDSegmentation

__all__ = ["VPD", "VPDDepth", "VPDReferring", "VPDSegmentation"]
