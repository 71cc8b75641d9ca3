"""PyTorch's own files, zip archives and the streams from before 1.6, read without running anything in them."""

from __future__ import annotations

import io
import math
import mmap
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpd_fast.checkpoints import limits, pickles
from vpd_fast.checkpoints.mapped import MappedFile
from vpd_fast.checkpoints.pickles import Budget, Global, PickleError, Unpickled
from vpd_fast.errors import brief

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_DIMENSIONS = 64

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
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
# What torch.save has no storage class for, it stores as bytes, with the dtype beside them.
_NEWER = (
    "uint16 uint32 uint64 complex32 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu".split()  # noqa: SIM905
)
_DTYPES = {str(dtype): dtype for dtype in (*_STORAGE_DTYPES.values(), *(getattr(torch, name) for name in _NEWER))}
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
        raise PickleError(f"{what} is {brief(value)}, expected a non-negative int")
    return value


def _storage_from_id(pid: Any) -> tuple[str, _Storage]:
    if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], Global)):
        raise PickleError("persistent id is not a tensor storage")
    dtype = _STORAGE_DTYPES.get(pid[1].name.rpartition(".")[2]) if pid[1].name in _NAMES else None
    if dtype is None:
        raise PickleError(f"unknown storage type {brief(pid[1])}")
    if not isinstance(pid[2], str):
        raise PickleError("storage key is not text")
    return pid[2], _Storage(dtype, _whole(pid[4], "storage size"))


def _rebuild(budget: Budget, storage: Any, dtype: Any, offset: Any, size: Any, stride: Any, metadata: Any) -> Tensor:
    """Return a tensor over `storage`, after checking that it stays inside. It may repeat elements (`MAX_SHARED`)."""
    budget.use("tensors", 1, limits.MAX_TENSORS)
    if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise PickleError("malformed tensor")
    dtype = storage.dtype if dtype is None else dtype
    offset = _whole(offset, "tensor offset")
    if len(size) != len(stride) or len(size) > _MAX_DIMENSIONS:
        raise PickleError("tensor size and stride have different lengths, or too many")
    size = tuple(_whole(n, "tensor size") for n in size)
    stride = tuple(_whole(n, "tensor stride") for n in stride)
    available = storage.nbytes // dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= available:
        raise PickleError(
            f"tensor of size {brief(size)}, stride {brief(stride)}, offset {offset} in {available} stored elements"
        )
    tensor = torch.empty(0, dtype=dtype).set_(storage.data, offset, size, stride)
    views = metadata if isinstance(metadata, dict) else {}
    tensor = torch.ops.aten._neg_view.default(tensor) if views.get("neg") is True else tensor
    return tensor.conj() if views.get("conj") is True and dtype.is_complex else tensor


def _rebuild_tensor(
    budget: Budget, storage: Any, offset: Any, size: Any, stride: Any, _: Any = None, hooks: Any = None, *rest: Any
) -> Tensor:
    """Stand for torch._utils._rebuild_tensor and _rebuild_tensor_v2: storage, sizes, ..., flags of views."""
    return _rebuild(budget, storage, None, offset, size, stride, rest[0] if rest else None)


def _rebuild_tensor_v3(
    budget: Budget, storage: Any, offset: Any, size: Any, stride: Any, _: Any, hooks: Any, dtype: Any, *rest: Any
) -> Tensor:
    """Stand for torch._utils._rebuild_tensor_v3, which names the dtype of a storage of bytes."""
    known = _DTYPES.get(dtype.name) if isinstance(dtype, Global) else None
    if known is None:
        raise PickleError(f"unknown dtype {brief(dtype)}")
    return _rebuild(budget, storage, known, offset, size, stride, rest[0] if rest else None)


def _rebuild_parameter(_: Budget, data: Any, *rest: Any) -> Any:
    return data


_CONSTRUCTORS: dict[str, pickles.Constructor] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}


def _load(stream: Any, persistent_load: Callable[[Any], Any], budget: Budget) -> Unpickled:
    return pickles.load(stream, persistent_load, _CONSTRUCTORS, _NAMES, budget)


def read_zip(path: Path) -> tuple[Unpickled, MappedFile]:
    """Read a file of torch.save (1.6 or later); its tensors are views of the mapped file, which is returned too."""
    with path.open("rb") as file:
        _check_directory(file)
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
        roots = [name[: -len("data.pkl")] for name in entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise PickleError("a zip archive, but not one of torch.save: it has no single data.pkl")
        root = roots[0]
        if f"{root}constants.pkl" in entries or any(name.startswith(f"{root}code/") for name in entries):
            raise PickleError("a TorchScript program; expected the weights alone (a state dict written by torch.save)")
        mapped = MappedFile(path)
        byteorder, pickled = entries.get(f"{root}byteorder"), entries[f"{root}data.pkl"]
        if byteorder is not None:
            if byteorder.file_size > limits.MAX_SMALL_ENTRY:
                raise PickleError(f"an entry for the order of bytes that has {byteorder.file_size} bytes")
            if _bytes_of(file, byteorder, mapped) != b"little":
                raise PickleError("written on a big-endian machine")
        storages: dict[str, _Storage] = {}

        def persistent_load(pid: Any) -> _Storage:
            key, storage = _storage_from_id(pid)
            if key not in storages:
                entry = entries.get(f"{root}data/{key}")
                if entry is None:
                    raise PickleError(f"tensor data {brief(key)} is missing from the archive")
                storage.data = _entry_bytes(file, entry, mapped, storage.nbytes)
                storages[key] = storage
            return _same_dtype(storages[key], storage)

        return _load(io.BytesIO(_bytes_of(file, pickled, mapped)), persistent_load, Budget()), mapped


def _check_directory(file: Any) -> None:
    """Raise PickleError where the archive's list of entries is too long to be read."""
    end = file.seek(0, io.SEEK_END)
    file.seek(max(0, end - 2**16 - 22))
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    listed = struct.unpack("<I", tail[at + 12 : at + 16])[0] if 0 <= at <= len(tail) - 22 else 0
    if listed == 2**32 - 1:  # a 64-bit archive has the number in a record before it, whose place is 20 bytes before
        (place,) = struct.unpack("<Q", tail[at - 12 : at - 4]) if at >= 20 else (end,)
        file.seek(min(place + 40, end))
        listed = int.from_bytes(file.read(8), "little")
    if listed > limits.MAX_DIRECTORY:
        raise PickleError(f"an archive whose list of entries has {listed} bytes")


def _bytes_of(file: Any, entry: zipfile.ZipInfo, mapped: MappedFile) -> bytes:
    """Return the content of an entry, checked against its check sum where it has one."""
    storage = _entry_bytes(file, entry, mapped, entry.file_size)
    content = bytes(torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data)
    if entry.CRC not in (0, zlib.crc32(content)):
        raise PickleError(f"archive entry {brief(entry.filename)} does not fit its check sum")
    return content


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
            f"archive entry {brief(entry.filename)} is compressed or shorter than the {nbytes} bytes of its tensor"
        )
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise PickleError(f"archive entry {brief(entry.filename)} has a damaged header")
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if start + nbytes > mapped.size:
        raise PickleError(f"archive entry {brief(entry.filename)} runs past the end of the file")
    return mapped.storage(start, nbytes)


def is_legacy(head: bytes) -> bool:
    """Return whether `head` begins a stream of torch.save before 1.6: a pickled magic number."""
    return LEGACY_MAGIC.to_bytes(10, "little") in head[:32]


def read_legacy(path: Path) -> Unpickled:
    """Read a file of torch.save < 1.6 or with `_use_new_zipfile_serialization=False`; copies, as nothing is aligned."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        budget = Budget()
        magic, protocol, system = (_load(stream, _no_storages, budget).value for _ in range(3))
        if magic != LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL:
            raise PickleError("not a PyTorch stream")
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise PickleError("written on a big-endian machine")
        storages: dict[str, _Storage] = {}
        total = 0

        def persistent_load(pid: Any) -> Any:
            nonlocal total
            if isinstance(pid, tuple) and pid and pid[0] == "module":
                return pid[1] if len(pid) > 1 else None  # a class with its source text, which is not read
            key, storage = _storage_from_id(pid)
            if len(pid) > 5 and pid[5] is not None:
                raise PickleError("storage views, as written by torch 0.x, are not supported")
            if key not in storages:
                # The bytes come after the pickle: tensors are made over memory that is filled at the end.
                total += storage.nbytes
                if total > len(stream):
                    raise PickleError("file is smaller than its tensors")
                storage.data = torch.UntypedStorage(storage.nbytes, device="cpu")
                storages[key] = storage
            return _same_dtype(storages[key], storage)

        result = _load(stream, persistent_load, budget)
        keys = _load(stream, _no_storages, budget).value
        if not isinstance(keys, list) or len(keys) != len(storages) or set(keys) != set(storages):
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
