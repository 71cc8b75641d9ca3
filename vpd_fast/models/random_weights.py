"""Random but repeatable weights, for demonstrations and benchmarks without a checkpoint."""

from __future__ import annotations

import math
import zlib

import torch
from torch import nn

from vpd_fast.models.vpd import VPD


def randomize(model: VPD, seed: int = 0, device: torch.device | str = "cpu") -> VPD:
    """Fill `model`, also one of `VPD.empty`, in place with weights that depend on name, shape and `seed` only.

    device: where a model of `VPD.empty` gets its memory, and where random numbers are drawn, for which a CPU needs half
    a minute at full size. A seed stands for other numbers on another kind of device.
    Matrices and kernels ~ N(0, 1/fan_in), which keeps activations near unit scale; norms are the identity, biases zero,
    text embeddings ~ N(0, 1), gamma 0.5.
    """
    if model.device.type == "meta":
        # `to_empty` takes four times as long: it derives strides in Python.
        model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))
    running_var = {f"{name}.running_var" for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("class_embeddings"):
                _normal(tensor, name, seed, 1.0, device)
            elif tensor.dim() > 1:
                _normal(tensor, name, seed, math.prod(tensor.shape[1:]) ** -0.5, device)
            elif name.endswith("gamma"):
                tensor.fill_(0.5)
            else:
                tensor.fill_(1.0 if name.endswith("weight") or name in running_var else 0.0)
    return model


def _normal(tensor: torch.Tensor, name: str, seed: int, std: float, device: torch.device | str) -> None:
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()) ^ (seed * 0x9E3779B1 & 0xFFFFFFFF))
    tensor.copy_(torch.randn(tensor.shape, generator=generator, device=device) * std)
