"""Opens any checkpoint file: its tensors by name, memory-mapped where the format allows, and plain metadata."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpd_fast.checkpoints import archives
from vpd_fast.checkpoints.limits import MAX_NAME, MAX_SHARED
from vpd_fast.checkpoints.mapped import MappedFile, copied
from vpd_fast.checkpoints.names import without_wrappers
from vpd_fast.checkpoints.pickles import Unpickled
from vpd_fast.checkpoints.safetensors_files import read_safetensors
from vpd_fast.checkpoints.state_dicts import find_state_dict
from vpd_fast.errors import CheckpointError, brief
from vpd_fast.files import MAX_SETTINGS, read_json_object, require_regular
from vpd_fast.models.finite import all_finite, why_not_finite

_EXPECTED = "expected a PyTorch checkpoint (.pth, .pt, .ckpt, .bin), a .safetensors file or a checkpoint folder"


@dataclass
class RawFile:
    """Contents of one file: named tensors, plain metadata, and what could not be kept.

    placeholders: classes of pickled objects that were not rebuilt. skipped: state-dict entries that are not tensors.
    averaged: the tensors are the averages that were asked for.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    placeholders: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    averaged: bool = False
    mapped: MappedFile | None = None

    @property
    def files(self) -> tuple[MappedFile, ...]:
        """The mapped file that tensors lie in, if they do."""
        return () if self.mapped is None else (self.mapped,)


def read_file(path: str | Path, *, mmap: bool = True, ema: bool = False) -> RawFile:
    """Read one file of any kind. Nothing in it is executed.

    ema: the averages over the training, where the file has them beside the weights as a state dict of their own.
    mmap: tensors stay on disk until used; they can be written to without changing the file, but the file must not be
    overwritten in place while they live (replacing it by rename is fine). False reads all tensors into memory.
    Raises CheckpointError: missing, empty, truncated, damaged or unknown file.
    """
    path = Path(path)
    with _explained(path):
        head = _head(path)
        if _is_safetensors(path, head):
            tensors, metadata, mapped = read_safetensors(path)
            _check_sizes(path, tensors)
            raw = RawFile(path, without_wrappers(tensors), dict(metadata), mapped=mapped)
        elif head.startswith(b"PK\x03\x04"):
            unpickled, mapped = archives.read_zip(path)
            raw = _from_object(path, unpickled, ema)
            raw.mapped = mapped
        elif archives.is_legacy(head):
            raw = _from_object(path, archives.read_legacy(path), ema)
        else:
            raise CheckpointError(f"{path}: {_guess(head)}; {_EXPECTED}")
        if not mmap:
            raw.tensors = {key: copied(tensor, raw.files) for key, tensor in raw.tensors.items()}
    return raw


def read_tensor(path: str | Path) -> Tensor:
    """Read the only tensor of a file, such as VPD's class_embeddings.pth. Raises CheckpointError if there are more, or
    it is not finite."""
    raw = read_file(path)
    if len(raw.tensors) != 1:
        raise CheckpointError(f"{path}: expected one tensor, the file holds {len(raw.tensors)}")
    tensor = copied(next(iter(raw.tensors.values())), raw.files)
    if not all_finite(tensor):
        raise CheckpointError(f"{path}: {why_not_finite(tensor, tensor)}")
    return tensor


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError."""
    path = Path(path)
    with _explained(path):
        try:
            return read_json_object(path)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Whatever a broken file provokes in the parsers becomes one CheckpointError that names the file."""
    try:
        yield
    except CheckpointError as error:
        if str(error).startswith(str(path)):
            raise
        raise CheckpointError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file or folder; {_EXPECTED}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"{path}: truncated or damaged file ({reason}); {_EXPECTED}") from error


def _head(path: Path) -> bytes:
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; expected a file")
    require_regular(path)
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise CheckpointError(f"{path}: the file is empty; {_EXPECTED}")
    return head


def _is_safetensors(path: Path, head: bytes) -> bool:
    if path.suffix == ".safetensors" and not head.startswith(b"version https://git-lfs"):
        return True
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_SETTINGS


def _guess(head: bytes) -> str:
    """Return what an unknown file probably is, for the error message."""
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the checkpoint itself (run `git lfs pull`)"
    if head.lstrip()[:1] == b"<":
        return "is an HTML or XML page (a failed download?)"
    if head[257:262] == b"ustar":
        return "is a tar archive (or a checkpoint of torch older than 0.1.10)"
    if head[:2] in (b"\x1f\x8b", b"BZ") or head[:6] == b"\xfd7zXZ\x00":
        return "is a compressed file (unpack it first)"
    if head[:1] == b"\x80":
        return "is a plain pickle, not a file of torch.save"
    if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head):
        return "is a text file"
    return "is not a checkpoint"


def _from_object(path: Path, unpickled: Unpickled, ema: bool) -> RawFile:
    value = unpickled.value
    placeholders = tuple(sorted(unpickled.placeholders))
    if isinstance(value, Tensor):
        _check_sizes(path, {"": value})
        return RawFile(path, {"": _plain(value)}, {}, placeholders)
    state, metadata, found = find_state_dict(value, ema)
    tensors = {key: item for key, item in state.items() if isinstance(key, str) and isinstance(item, Tensor)}
    _check_sizes(path, tensors)
    tensors = {key: _plain(tensor) for key, tensor in tensors.items()}
    skipped = tuple(key if isinstance(key, str) else brief(key) for key in state if key not in tensors)
    return RawFile(path, without_wrappers(tensors), metadata, placeholders, skipped, found)


def _check_sizes(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for tensors that together are much larger than the file that they are said to be in."""
    size, total = path.stat().st_size, sum(tensor.nbytes for tensor in tensors.values())
    if total > size + MAX_SHARED:
        raise ValueError(f"tensors of {total} bytes share the memory of a file of {size} bytes")
    long = next((key for key in tensors if len(key) > MAX_NAME), None)
    if long is not None:
        raise ValueError(f"a weight whose name has {len(long)} characters, {brief(long)}")


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor with elements of its own: neither repeated, as by expand(), nor negated when read."""
    tensor = tensor.resolve_conj().resolve_neg()
    if not tensor.numel():
        return tensor
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.contiguous() if tensor.numel() > span else tensor


def dtype_names(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Count the tensors of each floating dtype: {"float16": 12}."""
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            name = str(tensor.dtype).removeprefix("torch.")
            counts[name] = counts.get(name, 0) + 1
    return counts


def require_finite(path: Path, key: str, tensor: Tensor, stored: Tensor) -> None:
    """Raise CheckpointError, which names the weight, unless all of `tensor`, made of what was `stored`, is finite."""
    if not all_finite(tensor):
        raise CheckpointError(f"{path}: {key} {why_not_finite(tensor, stored)}")


def to_dtype(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> Tensor:
    """Convert a floating tensor to `dtype` (None: as it is), any to `device`; no copy where nothing changes."""
    return tensor.to(device=device, dtype=dtype if dtype is not None and tensor.is_floating_point() else None)
