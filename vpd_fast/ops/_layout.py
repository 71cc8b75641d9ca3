"""How tensors lie in memory, in the terms of kernels: strides, contiguity, names of dtypes."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

MaybeTensor = TypeVar("MaybeTensor", Tensor, "Tensor | None")


def last_contiguous(x: MaybeTensor) -> MaybeTensor:
    """Returns x, copied if its last dimension is strided."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def contiguous(x: MaybeTensor) -> MaybeTensor:
    """Returns x, copied if it is not contiguous."""
    return x if x is None else x.contiguous()


def rows_contiguous(x: MaybeTensor) -> MaybeTensor:
    """(B, ..., C) as (B, rows, C) with channels next to each other: a view, or a copy where strides do not allow it."""
    return last_contiguous(x if x is None or x.dim() == 3 else x.flatten(1, -2))


def leading_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of all dimensions but the last, in elements; 0 where the size is 1, for which PyTorch has any number."""
    return tuple(stride if size > 1 else 0 for stride, size in zip(x.stride()[:-1], x.shape, strict=False))


def dtype_name(x: Tensor) -> str:
    """Name of the dtype as native code knows it, such as "float32"."""
    return str(x.dtype).removeprefix("torch.")


def address_and_strides(maps: Tensor | None) -> tuple[int, tuple[int, ...]] | None:
    """Address and strides of maps (B, N, M), taken as (B, 1, N, M), or of (B, heads, N, M)."""
    if maps is None:
        return None
    if maps.dim() == 4:
        return maps.data_ptr(), maps.stride()
    batch, row, column = maps.stride()
    return maps.data_ptr(), (batch, 0, row, column)
