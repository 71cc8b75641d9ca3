"""Small files that would take hours or gigabytes, and tensors that are not stored as they are."""

from __future__ import annotations

import os
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vpd_fast.checkpoints import limits, load_checkpoint
from vpd_fast.checkpoints.reader import read_file
from vpd_fast.errors import CheckpointError

MAX_SECONDS, MAX_BYTES = 5.0, 200 * 2**20
MAX_MESSAGE = 600


def refused(path: Path, match: str) -> None:
    """The file is refused by a short message, soon, and without much memory."""
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=match) as caught:
        load_checkpoint(path)
    assert len(str(caught.value)) < MAX_MESSAGE
    assert time.process_time() - start < MAX_SECONDS + path.stat().st_size / 1e8
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MAX_BYTES + path.stat().st_size


# Pickles written by hand.
def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<i", len(data)) + data


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def tensor(offset: bytes = number(0), size: int = 16, stride: int = 1) -> bytes:
    storage = tuple_of(text("storage"), b"ctorch\nFloatStorage\n", text("0"), text("cpu"), number(16)) + b"Q"
    rest = (tuple_of(number(size)), tuple_of(number(stride)), b"\x89", b"ccollections\nOrderedDict\n)R")
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + tuple_of(storage, offset, *rest) + b"R"


def nested(depth: int, width: int) -> bytes:
    """A tuple of `width` times the same tuple, and so on: width**depth items in a few bytes."""
    data = tuple_of(b"N" * width) + b"r" + struct.pack("<I", 100)
    for level in range(1, depth):
        inner = b"j" + struct.pack("<I", 99 + level)
        data += b"0" + tuple_of(inner * width) + b"r" + struct.pack("<I", 100 + level)
    return data


def zipped(path: Path, pickle: bytes, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + pickle + b".")
        for name, content in ({"byteorder": b"little", "data/0": bytes(64)} | entries).items():
            archive.writestr(f"a/{name}", content)
    return path


MANY = b"(" + b"N" * 20_000 + b"lq\x00"  # a list that calls are made with
PICKLES: dict[str, tuple[Callable[[], bytes], str]] = {
    "message": (lambda: b"}" + text("a") + tensor(offset=nested(9, 10)) + b"s", "offset is"),
    "wide key": (lambda: b"}(" + text("a") + tensor() + nested(4, 60) + b"Nu", "key of more than"),
    "deep key": (lambda: b"}(" + nested(9, 1) + b"Nu", "nested too deeply"),
    "equal hashes": (lambda: b"}(" + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(50_000)) + b"u", "large"),
    "tuple keys": (lambda: b"}(" + b"".join(number(i) + b"\x85N" for i in range(3_000)) + b"u", "tuple keys"),
    "numbers of objects": (lambda: b"]" + b"".join(b"p%d\n" % (i * (2**61 - 1)) for i in range(30_000)), "number"),
    "copies": (lambda: MANY + b"cbuiltins\nset\nq\x010]" + b"h\x01h\x00\x85R0" * 20_000, "more than .* copies"),
    "arguments": (lambda: MANY + b"ca\nb\nq\x010]" + b"h\x01h\x00R0" * 20_000, "more than .* copies"),
    "instructions": (lambda: b"]" + b"N0" * limits.MAX_OPCODES, "more than .* instructions"),
    "objects": (lambda: b"(" + b"}" * (limits.MAX_OPCODES + 9) + b"l", "more than .* instructions"),
    "tensors": (lambda: tensor() + b"0" + b"](" + b"N" * 9 + b"e" + (tensor() + b"0") * 9 + b"}", "no tensors"),
    "name of a class": (lambda: b"c" + b"a" * 100_000 + b"\nb\n", "whose name has"),
    "name of a weight": (lambda: b"}(" + text("a" * 100_000) + tensor() + b"u", "whose name has"),
    "number of a storage": (lambda: b"}" + text("a") + tensor(offset=number(2**40_000)) + b"s", "offset is"),
    "outside": (lambda: b"}" + text("a") + tensor(size=17) + b"s", "16 stored elements"),
    "repeated": (lambda: b"}" + text("a") + tensor(size=2**40, stride=0) + b"s", "share the memory"),
    "kinds of values": (lambda: b"}" + text("model") + b"ca\nb\n" + nested(9, 10) + b"Rs", "which is not rebuilt"),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_hang(tmp_path: Path, name: str) -> None:
    make, message = PICKLES[name]
    refused(zipped(tmp_path / "a.pth", make()), message)


def test_long_checkpoints_are_read(tmp_path: Path) -> None:
    content = {"model": {"a": torch.ones(2)}, "losses": [0.5 + i for i in range(200_000)], ("a", 1): {3: None}}
    torch.save(content, tmp_path / "a.pth")
    assert len(read_file(tmp_path / "a.pth").metadata["losses"]) == 200_000


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
@pytest.mark.parametrize("name", ["byteorder", "data.pkl"])
def test_entries_that_unpack_to_gigabytes(tmp_path: Path, name: str, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w", method) as archive:
        with archive.open(f"a/{name}", "w", force_zip64=True) as entry:
            for _ in range(8):
                entry.write(bytes(2**24))
        if name == "byteorder":
            archive.writestr(zipfile.ZipInfo("a/data.pkl"), b"\x80\x02}.")
    refused(tmp_path / "a.pth", "bytes|compressed")


def test_archive_of_very_many_entries(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.comment = b"x" * 300
    data = bytearray((tmp_path / "a.pth").read_bytes())
    at = data.rfind(b"PK\x05\x06")
    data[at + 12 : at + 16] = struct.pack("<I", limits.MAX_DIRECTORY + 1)
    (tmp_path / "a.pth").write_bytes(data)
    refused(tmp_path / "a.pth", "list of entries")


def test_damaged_pickle_does_not_fit_its_check_sum(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.pth", b"}" + text("abcdef") + b"Ns")
    path.write_bytes(path.read_bytes().replace(b"abcdef", b"abcdeg"))
    refused(path, "check sum")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    refused(tmp_path / "pipe.pth", "a pipe, a device or a socket")
    with pytest.raises(CheckpointError, match="a pipe, a device"):
        load_checkpoint("/dev/zero")


def test_weights_that_share_too_much(tmp_path: Path) -> None:
    shared = torch.ones(2**20)
    torch.save({f"a{i}": shared for i in range(40)}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "share the memory of a file")


DTYPES = ["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128", "bfloat16", "bool"]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_of_today(tmp_path: Path, name: str, zipped: bool) -> None:
    tensor = torch.arange(8.0).to(getattr(torch, name))
    torch.save({"a": tensor}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found = read_file(tmp_path / "a.pth").tensors["a"]
    assert found.dtype == tensor.dtype
    assert bytes(found.view(torch.uint8).numpy()) == bytes(tensor.view(torch.uint8).numpy())
    if not tensor.is_complex() or name == "complex64":
        save_file({"a": tensor}, tmp_path / "a.safetensors")
        found = read_file(tmp_path / "a.safetensors").tensors["a"]
        assert found.dtype == tensor.dtype
        assert bytes(found.view(torch.uint8).numpy()) == bytes(tensor.view(torch.uint8).numpy())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("mmap", [True, False])
def test_views_that_are_not_what_is_stored(tmp_path: Path, zipped: bool, mmap: bool) -> None:
    values = torch.randn(6, dtype=torch.complex64)
    views = {
        "conjugate": values.conj(),
        "negative": values.clone().conj().imag,
        "both": values.conj()[1:4],
        "expanded": torch.ones(1).expand(5),
        "expanded row": torch.arange(3.0).expand(4, 3),
        "windows": torch.arange(6.0).unfold(0, 3, 1),
        "transposed": torch.arange(6.0).view(2, 3).t(),
    }
    assert views["negative"].is_neg()
    torch.save(views, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found = read_file(tmp_path / "a.pth", mmap=mmap).tensors
    for name, view in views.items():
        assert torch.equal(found[name], view), name
        assert not found[name].is_neg()
        assert not found[name].is_conj()
    found["expanded"][0] = 7
    assert found["expanded"].tolist() == [7, 1, 1, 1, 1]
