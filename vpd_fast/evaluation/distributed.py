"""What the processes of a run tell each other: gathered through torch.distributed, whichever backend it has."""

from __future__ import annotations

from typing import Any

from torch import distributed

from vpd_fast.errors import InputError


def check_group(rank: int, world_size: int) -> None:
    """Raise InputError unless this process can talk to `world_size - 1` others."""
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1 or not 0 <= rank < world_size:
        raise InputError(f"rank and world_size must be ints with 0 <= rank < world_size, got {rank!r}, {world_size!r}")
    if world_size == 1:
        return
    ready = distributed.is_available() and distributed.is_initialized()
    came = (distributed.get_rank(), distributed.get_world_size()) if ready else None
    if came != (rank, world_size):
        what = "torch.distributed is not initialised" if came is None else f"torch.distributed has {came}"
        raise InputError(f"rank {rank} of world_size {world_size}: {what}; expected a process group of that size")


def gather(value: Any, world_size: int) -> list[Any]:
    """Return `value` of every process, by rank. Every process must call it."""
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    distributed.all_gather_object(values, value)
    return values
