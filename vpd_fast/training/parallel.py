"""The processes of a run: who they are, and how they agree. Started by torchrun or accelerate launch, or only one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vpd_fast.errors import MissingDependencyError
from vpd_fast.evaluation.distributed import gather


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

        sharded: spread over the processes instead, in place; an optimizer is to be made of its parameters afterwards.
        """
        self.sharded = sharded and self.count > 1
        if self.sharded:
            from vpd_fast.training.sharding import shard

            shard(module, self.count)
            return module
        return self._accelerator.prepare_model(module)

    def no_sync(self, module: nn.Module, skip: bool) -> contextlib.AbstractContextManager:
        """Return a context in which, if `skip`, backward leaves gradients as each process has them."""
        if not skip:
            return contextlib.nullcontext()
        if self.sharded:
            from vpd_fast.training.sharding import no_sync

            return no_sync(module)
        return self._accelerator.no_sync(module)

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
