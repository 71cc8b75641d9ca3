"""The bytes of a file, mapped into memory, and copies of them that do not depend on the file any more."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor


class MappedFile:
    """A file in private memory: pages are read when they are used, and writing to one leaves the file as it is.

    What is mapped must not be overwritten in place: where the file became shorter, reading ends the process.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self.size = os.fstat(self._file.fileno()).st_size
        memory = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
        self._start = self._storage.data_ptr()

    def storage(self, start: int, nbytes: int) -> torch.UntypedStorage:
        """Return a part of the file; a copy where it is not aligned. Raises ValueError past the end."""
        if start < 0 or nbytes < 0 or start + nbytes > self.size:
            raise ValueError(f"{nbytes} bytes at {start} of a file of {self.size} bytes")
        data = self._storage[start : start + nbytes]
        return data.clone() if start % 8 else data

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor's memory is the file's."""
        return tensor.device.type == "cpu" and 0 <= tensor.data_ptr() - self._start < self.size

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a tensor that `holds` in memory of its own: read from the file, which is much faster than through
        the pages of the map."""
        if not tensor.is_contiguous() or not tensor.numel() or tensor.is_neg() or tensor.is_conj():
            return tensor.clone()
        result = torch.empty(tensor.shape, dtype=tensor.dtype)
        rest = result.view(-1).view(torch.uint8).numpy().data
        self._file.seek(tensor.data_ptr() - self._start)
        while rest:
            count = self._file.readinto(rest)
            if not count:
                raise ValueError("the file became shorter while it was read")
            rest = rest[count:]
        return result


def copied(tensor: Tensor, files: Iterable[MappedFile]) -> Tensor:
    """Return a tensor whose memory is none of the files'."""
    holder = next((file for file in files if file.holds(tensor)), None)
    return tensor if holder is None else holder.copy(tensor)
