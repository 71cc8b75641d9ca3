"""Reads .safetensors files: a header in JSON that says where each tensor lies, and the tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpd_fast.checkpoints.mapped import MappedFile
from vpd_fast.errors import brief
from vpd_fast.files import MAX_SETTINGS, parse_json

# The library maps files by their path, which must be UTF-8, and copies none; writing is its.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str], MappedFile]:
    """Return (tensors in the mapped file, metadata, the file). Raises OSError, ValueError."""
    file = MappedFile(path)
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(file.size - 8, MAX_SETTINGS):
            raise ValueError(f"a header of {length} bytes in a file of {file.size} (at most {MAX_SETTINGS})")
        header = parse_json(stream.read(length).decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not texts by name")
    return {key: _tensor(file, 8 + length, key, entry) for key, entry in header.items()}, metadata, file


def _tensor(file: MappedFile, data: int, key: str, entry: Any) -> Tensor:
    values: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype = _DTYPES.get(str(values.get("dtype")))
    shape, ends = _sizes(values.get("shape")), _sizes(values.get("data_offsets"))
    if dtype is None or shape is None or ends is None or len(ends) != 2:
        raise ValueError(f"tensor {brief(key)} is described as {brief(entry)}")
    nbytes = math.prod(shape) * dtype.itemsize
    if ends[1] - ends[0] != nbytes:
        raise ValueError(f"tensor {brief(key)} has {ends[1] - ends[0]} bytes, {dtype} {brief(shape)} has {nbytes}")
    tensor: Any = torch.empty(0, dtype=dtype)
    return tensor.set_(file.storage(data + ends[0], nbytes), 0, shape)


def _sizes(values: Any) -> tuple[int, ...] | None:
    """Return a list of sizes as a tuple, None for anything else."""
    if not isinstance(values, list) or len(values) > 64:
        return None
    return tuple(values) if all(type(n) is int and 0 <= n < 2**62 for n in values) else None
