"""PyTorch's own files, zip archives and the streams from before 1.6, read without running anything in them."""

from __future__ import annotations

import io
import math
import mmap
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vpd_fast.checkpoints import pickles
from vpd_fast.checkpoints.mapped import MappedFile
from vpd_fast.checkpoints.pickles import Global, PickleError, Unpickled

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {str(dtype): dtype for dtype in _STORAGE_DTYPES.values()}
_NAMES = frozenset(_DTYPES) | {
    f"{module}.{name}" for module in ("torch", "torch.cuda", "torch.storage") for name in _STORAGE_DTYPES
}


class _Storage:
    """Holds the bytes of a storage and the element type and count that the pickle declares."""

    def __init__(self, dtype: torch.dtype, elements: int) -> None:
        self.dtype = dtype
        self.elements = elements
        self.data = torch.UntypedStorage(0)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


def _whole(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
        raise PickleError(f"{what} is {value!r}, expected a non-negative int")
    return value


def _storage_from_id(pid: Any) -> tuple[str, _Storage]:
    if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], Global)):
        raise PickleError("persistent id is not a tensor storage")
    dtype = _STORAGE_DTYPES.get(pid[1].name.rpartition(".")[2]) if pid[1].name in _NAMES else None
    if dtype is None:
        raise PickleError(f"unknown storage type {pid[1].name}")
    if not isinstance(pid[2], str):
        raise PickleError("storage key is not text")
    return pid[2], _Storage(dtype, _whole(pid[4], "storage size"))


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> torch.Tensor:
    """Return a tensor over `storage`, after checking that it stays inside and does not repeat elements."""
    if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise PickleError("malformed tensor")
    dtype = storage.dtype
    if len(rest) == 4 and isinstance(rest[2], Global):  # _rebuild_tensor_v3 names the dtype of an untyped storage
        dtype = _DTYPES.get(rest[2].name)
        if dtype is None:
            raise PickleError(f"unknown dtype {rest[2].name}")
    offset = _whole(offset, "tensor offset")
    size = tuple(_whole(n, "tensor size") for n in size)
    stride = tuple(_whole(n, "tensor stride") for n in stride)
    if len(size) != len(stride):
        raise PickleError("tensor size and stride have different lengths")
    available = storage.nbytes // dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and (last >= available or math.prod(size) > available):
        raise PickleError(
            f"tensor of size {size}, stride {stride}, offset {offset} in a storage of {available} elements"
        )
    return torch.empty(0, dtype=dtype).set_(storage.data, offset, size, stride)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


_CONSTRUCTORS: dict[str, pickles.Constructor] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}


def _load(stream: Any, persistent_load: Callable[[Any], Any]) -> Unpickled:
    return pickles.load(stream, persistent_load, _CONSTRUCTORS, _NAMES)


def read_zip(path: Path) -> tuple[Unpickled, MappedFile]:
    """Read a file of torch.save (1.6 or later); its tensors are views of the mapped file, which is returned too."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entries = {entry.filename: entry for entry in archive.infolist()}
        roots = [name[: -len("data.pkl")] for name in entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise PickleError("a zip archive, but not one of torch.save: it has no single data.pkl")
        root = roots[0]
        if f"{root}constants.pkl" in entries or any(name.startswith(f"{root}code/") for name in entries):
            raise PickleError("a TorchScript program; expected the weights alone (a state dict written by torch.save)")
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise PickleError("written on a big-endian machine")
        if entries[f"{root}data.pkl"].compress_type != zipfile.ZIP_STORED:
            raise PickleError("a compressed zip archive; torch.save does not compress")
        mapped = MappedFile(path)
        storages: dict[str, _Storage] = {}

        def persistent_load(pid: Any) -> _Storage:
            key, storage = _storage_from_id(pid)
            if key not in storages:
                entry = entries.get(f"{root}data/{key}")
                if entry is None:
                    raise PickleError(f"tensor data {key!r} is missing from the archive")
                storage.data = _entry_bytes(file, entry, mapped, storage.nbytes)
                storages[key] = storage
            return _same_dtype(storages[key], storage)

        return _load(io.BytesIO(archive.read(f"{root}data.pkl")), persistent_load), mapped


def _same_dtype(known: _Storage, asked: _Storage) -> _Storage:
    """Return the storage as the element type asked for, checked against the bytes that exist."""
    if known.dtype == asked.dtype:
        return known
    if asked.nbytes > known.nbytes:
        raise PickleError("one storage referred to with two sizes")
    asked.data = known.data
    return asked


def _entry_bytes(file: Any, entry: zipfile.ZipInfo, mapped: MappedFile, nbytes: int) -> torch.UntypedStorage:
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size < nbytes:
        raise PickleError(
            f"archive entry {entry.filename!r} is compressed or shorter than the {nbytes} bytes of its tensor"
        )
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise PickleError(f"archive entry {entry.filename!r} has a damaged header")
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if start + nbytes > mapped.size:
        raise PickleError(f"archive entry {entry.filename!r} runs past the end of the file")
    return mapped.storage(start, nbytes)


def is_legacy(head: bytes) -> bool:
    """Return whether `head` begins a stream of torch.save before 1.6: a pickled magic number."""
    return LEGACY_MAGIC.to_bytes(10, "little") in head[:32]


def read_legacy(path: Path) -> Unpickled:
    """Read a file of torch.save < 1.6 or with `_use_new_zipfile_serialization=False`; copies, as nothing is aligned."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        magic, protocol, system = (_load(stream, _no_storages).value for _ in range(3))
        if magic != LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL:
            raise PickleError("not a PyTorch stream")
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise PickleError("written on a big-endian machine")
        storages: dict[str, _Storage] = {}

        def persistent_load(pid: Any) -> Any:
            if isinstance(pid, tuple) and pid and pid[0] == "module":
                return pid[1] if len(pid) > 1 else None  # a class with its source text, which is not read
            key, storage = _storage_from_id(pid)
            if len(pid) > 5 and pid[5] is not None:
                raise PickleError("storage views, as written by torch 0.x, are not supported")
            if key not in storages:
                # The bytes come after the pickle: tensors are made over memory that is filled at the end.
                if storage.nbytes + sum(s.nbytes for s in storages.values()) > len(stream):
                    raise PickleError("file is smaller than its tensors")
                storage.data = torch.UntypedStorage(storage.nbytes, device="cpu")
                storages[key] = storage
            return _same_dtype(storages[key], storage)

        result = _load(stream, persistent_load)
        keys = _load(stream, _no_storages).value
        if not isinstance(keys, list) or set(keys) != set(storages):
            raise PickleError("the list of storages does not match the tensors")
        file.seek(stream.tell())
        for key in keys:
            _fill_legacy_storage(file, storages[key])
        return result


def _no_storages(_: Any) -> Any:
    raise PickleError("unexpected persistent id")


def _fill_legacy_storage(file: Any, storage: _Storage) -> None:
    (elements,) = struct.unpack("<q", file.read(8))
    if elements != storage.elements:
        raise PickleError("a storage has another size than its tensors say")
    buffer = torch.empty(0, dtype=torch.uint8).set_(storage.data)
    if file.readinto(buffer.numpy()) != storage.nbytes:
        raise PickleError("file ends inside a tensor")
