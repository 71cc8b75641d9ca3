"""Weights, gradients and optimizer spread over processes (PyTorch's fully_shard), and put together again for files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vpd_fast.models import VPD
from vpd_fast.models.unet import UNetBlock


def shard(module: nn.Module, processes: int) -> None:
    """Spread the trained parameters of `module` over all processes, in place; the frozen ones stay whole.

    Each of the UNet's blocks is gathered when it runs. Every process must hold the same weights before.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(module.parameters()).device.type, (processes,))
    frozen = {p for p in module.parameters() if not p.requires_grad}
    for block in [m for m in module.modules() if isinstance(m, UNetBlock)]:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh, ignored_params=frozen)


@contextlib.contextmanager
def no_sync(module: nn.Module) -> Iterator[None]:
    """Keep gradients in each process while this is entered."""
    from torch.distributed.fsdp import FSDPModule

    assert isinstance(module, FSDPModule)
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def whole(value: Any) -> Any:
    """Return `value` with all of each tensor that is spread, also inside containers. All processes must call it."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    return value


def whole_model(model: VPD) -> VPD:
    """Return a copy of `model` with all weights in this process, in eval mode; the model itself if nothing is spread.

    All processes must call it.
    """
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return model.eval()
    copy = VPD.empty(model.config)
    copy.load_state_dict(whole(model.state_dict()), assign=True)
    copy.attention_backend = model.attention_backend
    return copy.requires_grad_(False).eval()


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return `optimizer.state_dict()` with whole tensors. All processes must call it."""
    state = optimizer.state_dict()
    return {**state, "state": whole(state["state"])}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `optimizer_state` returned."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    spread = {i: _like(parameters[i], values) for i, values in state["state"].items() if i < len(parameters)}
    optimizer.load_state_dict({**state, "state": {**state["state"], **spread}})


def _like(parameter: Tensor, values: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(parameter, DTensor):
        return dict(values)
    return {
        name: distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
        if isinstance(value, Tensor) and value.shape == parameter.shape
        else value
        for name, value in values.items()
    }
