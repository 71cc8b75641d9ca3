"""Files of every kind, whole, cut short and damaged."""

from __future__ import annotations

import argparse
import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vpd_fast.checkpoints import read_tensor
from vpd_fast.checkpoints.pickles import Placeholder
from vpd_fast.checkpoints.reader import RawFile, read_file
from vpd_fast.errors import CheckpointError

KINDS = ("zip", "legacy", "safetensors")


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(5, 7, generator=generator)
    return {
        "matrix": base,
        "transposed": torch.randn(4, 3, generator=generator).t(),
        "slice": torch.randn(10, generator=generator)[3:6],
        "half": base[0].half(),
        "bfloat": base[1].bfloat16(),
        "double": base[2].double(),
        "count": torch.tensor(12),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
    }


def write(path: Path, kind: str, content: dict | None = None) -> Path:
    content = weights() if content is None else content
    if kind == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file({k: v.contiguous() for k, v in content.items()}, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    return path


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(sorted(found)) == sorted(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(tmp_path: Path, kind: str, mmap: bool) -> None:
    check_equal(read_file(write(tmp_path / "a.pth", kind), mmap=mmap).tensors, weights())


# Protocol 0 cannot hold torch's persistent ids; legacy streams begin with a number that needs protocol 2.
@pytest.mark.parametrize(
    ("kind", "protocol"), [("zip", n) for n in (1, 2, 3, 4, 5)] + [("legacy", n) for n in (2, 3, 4, 5)]
)
def test_pickle_protocols(tmp_path: Path, kind: str, protocol: int) -> None:
    content = {"model": weights(), "args": argparse.Namespace(max_depth=7.5, names={"a", "b"}), "big": 2**70, "n": -5}
    path = tmp_path / "a.pth"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=kind == "zip")
    raw = read_file(path)
    check_equal(raw.tensors, weights())
    assert raw.metadata["big"] == 2**70
    assert raw.metadata["n"] == -5
    assert raw.metadata["args"].state["max_depth"] == 7.5
    assert "argparse.Namespace" in raw.placeholders


def test_training_state_becomes_data(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    content = {
        "state_dict": OrderedDict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "best": np.float64(0.5),
        "array": np.arange(3),
        "path": Path("somewhere"),
        "callbacks": {argparse.ArgumentParser: {"best": torch.ones(2)}},
        "extra": torch.nn.Parameter(torch.ones(2)),
    }
    torch.save(content, tmp_path / "a.ckpt")
    raw = read_file(tmp_path / "a.ckpt")
    check_equal(raw.tensors, model.state_dict())
    assert torch.equal(raw.metadata["extra"], torch.ones(2))
    assert isinstance(raw.metadata["best"], Placeholder)
    assert isinstance(raw.metadata["path"], Placeholder)
    step = raw.metadata["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(step, optimizer.state_dict()["state"][0]["exp_avg"])
    assert "argparse.ArgumentParser" in raw.placeholders


@pytest.mark.parametrize("container", ["state_dict", "model", "model_state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_containers_and_wrappers(tmp_path: Path, container: str | None, prefix: str) -> None:
    state = {prefix + key: value for key, value in weights().items()}
    torch.save({container: state, "epoch": 3} if container else state, tmp_path / "a.pth")
    raw = read_file(tmp_path / "a.pth")
    check_equal(raw.tensors, weights())
    assert raw.metadata == ({"epoch": 3} if container else {})


def test_single_tensor(tmp_path: Path) -> None:
    torch.save(torch.ones(3, 4), tmp_path / "a.pth")
    assert torch.equal(read_tensor(tmp_path / "a.pth"), torch.ones(3, 4))
    save_file({"embeddings": torch.ones(3, 4)}, tmp_path / "a.safetensors")
    assert torch.equal(read_tensor(tmp_path / "a.safetensors"), torch.ones(3, 4))
    torch.save(weights(), tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="one tensor, the file holds 9"):
        read_tensor(tmp_path / "b.pth")


@pytest.mark.parametrize("kind", KINDS)
def test_writing_to_tensors_leaves_the_file_alone(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "a.pth", kind)
    before = path.read_bytes()
    raw = read_file(path)
    for tensor in raw.tensors.values():
        tensor.fill_(1)
    assert path.read_bytes() == before
    check_equal(read_file(path).tensors, weights())


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_outlive_a_replaced_file(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "a.pth", kind)
    raw = read_file(path)
    other = tmp_path / "other"
    other.write_bytes(b"nothing")
    other.replace(path)
    check_equal(raw.tensors, weights())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (b"just some words\n", "text file"),
        (b"\x1f\x8b\x08" + bytes(30), "compressed"),
        (b"PK\x03\x04" + bytes(60), "truncated or damaged"),
        (b"\x80\x04}.", "plain pickle"),
        (bytes(range(200, 256)) * 3, "not a checkpoint"),
    ],
)
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_files_that_are_no_checkpoint(tmp_path: Path, content: bytes, expected: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    if name == "a.pth" or "lfs" in expected or "empty" in expected:
        assert expected in str(caught.value)


def test_missing_path_and_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_file(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_file(tmp_path)


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"a": 1}, [1, 2], 5, {"model": {"a": "b"}}])
def test_no_tensors(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="state dict"):
        read_file(tmp_path / "a.pth")


def read_or_refuse(path: Path) -> bool:
    try:
        raw = read_file(path)
    except CheckpointError:
        return False
    assert isinstance(raw, RawFile)
    for tensor in raw.tensors.values():
        tensor.double().sum()  # every byte is readable
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_anywhere(tmp_path: Path, kind: str) -> None:
    whole = write(tmp_path / "a.pth", kind).read_bytes()
    path = tmp_path / f"cut{'.safetensors' if kind == 'safetensors' else '.pth'}"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert not read_or_refuse(path), f"{length} of {len(whole)} bytes were accepted"


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_anywhere(tmp_path: Path, kind: str) -> None:
    """Flipped bytes give tensors (in the data, nobody can tell) or a CheckpointError, nothing else."""
    content = {"state_dict": weights(), "args": argparse.Namespace(a=1), "x": [1, (2, "b"), {3: None}]}
    whole = write(tmp_path / "a.pth", kind, None if kind == "safetensors" else content).read_bytes()
    path = tmp_path / f"bad{'.safetensors' if kind == 'safetensors' else '.pth'}"
    generator = random.Random(7)
    refused = 0
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(generator.choice((1, 1, 2, 8))):
            damaged[generator.randrange(len(whole))] = generator.randrange(256)
        path.write_bytes(damaged)
        refused += not read_or_refuse(path)
    assert 0 < refused < 500
