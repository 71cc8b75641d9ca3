"""Whether Triton kernels can run."""

from __future__ import annotations

import importlib.util
import os

from torch import Tensor


def triton_missing(x: Tensor, name: str = "x") -> str | None:
    """Why Triton kernels cannot run where the argument `name` is, or None.

    With TRITON_INTERPRET=1 they run on the CPU, for tests.
    """
    interpreted = x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if x.device.type != "cuda" and not interpreted:
        return f"{name} is on {x.device}, not on a GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it comes with PyTorch's GPU builds)"
    from vpd_fast.kernels._common import device_refuses

    return device_refuses(x, name)
