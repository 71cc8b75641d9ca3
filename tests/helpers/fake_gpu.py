"""Tensors that claim to be on a GPU, also where there is none: with memory on the CPU, or without any."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode


def indexed(x: Tensor, index: object) -> Tensor:
    """x[index]. PyTorch's own asks for the device, which builds for CPUs only do not know."""
    index = index if isinstance(index, tuple) else (index,)
    dim = 0
    for place, i in enumerate(index):
        if i is Ellipsis:
            dim = x.dim() - sum(other is not None for other in index[place + 1 :])
        elif isinstance(i, int):
            x = x.select(dim, i)
        else:
            if i is None:
                x = x.unsqueeze(dim)
            elif isinstance(i, slice):
                x = torch.ops.aten.slice.Tensor(x, dim, *i.indices(x.shape[dim]))
            else:
                x = torch.ops.aten.index.Tensor(x, [None] * dim + [i])
            dim += 1
    return x


def copied(x: Tensor, source: Tensor) -> Tensor:
    """x.copy_(source), for the same reason."""
    assert source.device == x.device
    assert torch.broadcast_shapes(x.shape, source.shape) == x.shape
    return x


@contextmanager
def tensors_without_memory() -> Iterator[None]:
    """Tensors have shapes, strides and devices, but no memory; operations check that the devices agree."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "__getitem__", indexed)
        patch.setattr(Tensor, "copy_", copied)
        with FakeTensorMode():
            yield


LARGE = 1 << 18  # elements


class OnGpu(Tensor):
    """A CPU tensor that says it is on a GPU, as does what is computed from it."""

    is_cuda = True
    device = torch.device("cuda", 0)


def is_gpu(device: object) -> bool:
    """Whether something that names a device names a GPU."""
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


class PretendedGpu(TorchFunctionMode):
    """What is made on a GPU, or moved there, is made on the CPU as `OnGpu`."""

    def __torch_function__(self, func: Callable, types: Any, args: Sequence = (), kwargs: dict | None = None) -> Any:
        """Calls the function with the CPU in place of a GPU."""
        kwargs = kwargs or {}
        if func is Tensor.cuda or (func is Tensor.to and any(map(is_gpu, (*args[1:2], *kwargs.values())))):
            moved = args[0].as_subclass(Tensor)
            copies = kwargs.get("copy") or not args[0].is_cuda
            dtypes = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.dtype)]
            moved = moved.to(*dtypes)
            return (moved.clone() if copies and moved is not args[0] else moved).as_subclass(OnGpu)
        if func is Tensor.cpu or (func is Tensor.to and "cpu" in map(str, (*args[1:2], *kwargs.values()))):
            return func(*args, **kwargs).as_subclass(Tensor)
        if (
            func is torch.randn and prod(args if isinstance(args[0], int) else args[0]) > LARGE
        ):  # values that nobody looks at
            func = torch.zeros
            kwargs.pop("generator", None)
        if func is torch.Generator or not is_gpu(kwargs.get("device")):
            return func(*args, **kwargs)
        return func(*args, **{**kwargs, "device": "cpu"}).as_subclass(OnGpu)


def attention_scratch(call: Any, *_: object) -> int:
    """Raises ValueError for sizes that csrc/cuda/cross_attention_maps.cu refuses; tests/native compares the two."""
    _, _, tokens, _, dim = call.sizes
    if dim % 8 or tokens > 256 or dim > 160:
        raise ValueError(f"no kernel takes {tokens} tokens and {dim} elements per head")
    return 0
