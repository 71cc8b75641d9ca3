"""The processes of a run, started by torchrun or accelerate launch, or only one: who they are, how they agree, and
weights, gradients and optimizer spread over them (PyTorch's fully_shard) and put together again for files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vpd_fast.errors import MissingDependencyError
from vpd_fast.evaluation.distributed import gather
from vpd_fast.models import VPD
from vpd_fast.models.unet import UNetBlock


class Processes:
    """`accelerate`'s view of the processes, and what the trainer does with it.

    cpu: stay on the CPU even if there is a GPU. find_unused: parameters may be without gradient.
    """

    def __init__(self, cpu: bool = False, find_unused: bool = False) -> None:
        try:
            from accelerate import Accelerator, DistributedDataParallelKwargs
        except ImportError as error:
            raise MissingDependencyError('training needs accelerate: pip install "vpd_fast[train]"') from error
        # Autocast is the step's own affair: accelerate keeps one precision for the life of the process.
        self._accelerator = Accelerator(
            cpu=cpu or not torch.cuda.is_available(),
            mixed_precision="no",
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=find_unused, gradient_as_bucket_view=True)
            ],
        )
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.count: int = self._accelerator.num_processes
        self.sharded = False

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and speaks."""
        return self.rank == 0

    def wrap(self, module: nn.Module, sharded: bool = False) -> nn.Module:
        """Return the module on the device, in DistributedDataParallel where there are several processes.

        sharded: spread its trained parameters over the processes instead, in place (frozen ones stay whole); each of
        the UNet's blocks is gathered when it runs. Every process must hold the same weights before; an optimizer is to
        be made of its parameters afterwards.
        """
        self.sharded = sharded and self.count > 1
        if not self.sharded:
            return self._accelerator.prepare_model(module)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(next(module.parameters()).device.type, (self.count,))
        frozen = {p for p in module.parameters() if not p.requires_grad}
        for block in [m for m in module.modules() if isinstance(m, UNetBlock)]:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh, ignored_params=frozen)
        return module

    @contextlib.contextmanager
    def no_sync(self, module: nn.Module, skip: bool) -> Iterator[None]:
        """If `skip`, let backward leave gradients as each process has them while this is entered."""
        if not skip:
            yield
        elif not self.sharded:
            with self._accelerator.no_sync(module):
                yield
        else:
            from torch.distributed.fsdp import FSDPModule

            assert isinstance(module, FSDPModule)
            module.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                module.set_requires_gradient_sync(True)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all processes."""
        if self.count == 1:
            return values
        torch.distributed.all_reduce(values)
        return values

    @contextlib.contextmanager
    def first_only(self) -> Iterator[None]:
        """Surround what only the first process does: its error ends all processes, instead of leaving them waiting."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        if self.count > 1:
            # Errors may hold what does not pickle, such as traceback frames or locks.
            said = gather(None if error is None else (type(error), str(error)), self.count)
            if error is None and said[0] is not None:
                raise said[0][0](said[0][1])
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait until all processes are here."""
        self._accelerator.wait_for_everyone()

    def share_buffers(self, module: nn.Module) -> None:
        """Give all processes the first one's running statistics of batch norm."""
        if self.count > 1:
            for buffer in batch_norm_buffers(module):
                torch.distributed.broadcast(buffer, 0)


def batch_norm_buffers(module: nn.Module) -> list[Tensor]:
    """Return the running means and variances, and how many batches they have seen."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]


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
