"""No file runs code: pickles made to execute something are read as data or refused."""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from vpd_fast.checkpoints import load_checkpoint, open_checkpoint, pickles
from vpd_fast.checkpoints.reader import read_file
from vpd_fast.errors import CheckpointError


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


def text(value: str) -> bytes:
    """Opcode that pushes a string."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def raw_payloads(sentinel: Path) -> dict[str, bytes]:
    """Hand-written pickles, each of which touches `sentinel` in an ordinary unpickler."""
    touch = text(f"touch {sentinel}")
    execute = text(f"open({str(sentinel)!r}, 'w')")
    stack_global = b"\x80\x04\x8c\x05posix\x8c\x06system\x93"
    subclass = b"\x80\x02c__builtin__\ntype\n" + text("A") + b"c__builtin__\nobject\n\x85}" + text("__setstate__")
    return {
        "reduce": b"\x80\x02cposix\nsystem\n" + touch + b"\x85R.",
        "stack global": stack_global + touch + b"\x85R.",
        "inst": b"(" + touch + b"iposix\nsystem\n.",
        "obj": b"(cposix\nsystem\n" + touch + b"o.",
        "eval": b"\x80\x02c__builtin__\neval\n" + execute + b"\x85R.",
        "getattr chain": b"\x80\x02c__builtin__\ngetattr\nc__builtin__\n__import__\n"
        + text("os")
        + b"\x85R"
        + text("system")
        + b"\x86R"
        + touch
        + b"\x85R.",
        "setstate": subclass + b"cposix\nsystem\ns\x87R)R" + touch + b"b.",
        "argument of a tensor": b"\x80\x02ctorch._utils\n_rebuild_parameter\ncposix\nsystem\n"
        + touch
        + b"\x85R\x89}\x87R.",
    }


def object_payloads(sentinel: Path) -> dict[str, object]:
    """Objects whose unpickling touches `sentinel`."""
    program = f"open({str(sentinel)!r}, 'w').close()"
    touch = Call(os.system, f"touch {sentinel}")
    return {
        "os.system": touch,
        "eval": Call(builtins.eval, program),
        "exec": Call(builtins.exec, program),
        "nested": Call(len, Call(dict, [("x", touch)])),
        "torch gadget": Call(torch.utils.collect_env.run, f"touch {sentinel}"),
        "numpy gadget": Call(__import__("numpy.testing._private.utils", fromlist=["x"]).runstring, program, {}),
        "dictionary key": {Call(os.system, f"touch {sentinel}"): 1},
        "list": [touch, touch],
    }


def weights() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def write_zip(path: Path, data: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")


@pytest.mark.parametrize("name", raw_payloads(Path("x")))
def test_raw_payload_does_not_run(tmp_path: Path, name: str) -> None:
    sentinel = tmp_path / "sentinel"
    payload = raw_payloads(sentinel)[name]
    write_zip(tmp_path / "file.pth", payload)
    with pytest.raises(CheckpointError):
        read_file(tmp_path / "file.pth")
    (tmp_path / "plain.pkl").write_bytes(payload)
    with pytest.raises(CheckpointError):
        read_file(tmp_path / "plain.pkl")
    pickles.load(io.BytesIO(payload), lambda pid: pid)
    assert not sentinel.exists()


@pytest.mark.parametrize("name", raw_payloads(Path("x")))
def test_raw_payload_is_dangerous_elsewhere(tmp_path: Path, name: str) -> None:
    """The payloads are real: Python's own unpickler runs them, whatever it makes of their results."""
    sentinel = tmp_path / "sentinel"
    with contextlib.suppress(Exception):
        pickle.loads(raw_payloads(sentinel)[name])
    assert sentinel.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", object_payloads(Path("x")))
def test_object_payload_does_not_run(tmp_path: Path, name: str, zipped: bool) -> None:
    sentinel = tmp_path / "sentinel"
    path = tmp_path / "file.pth"
    content = {"state_dict": weights(), "evil": object_payloads(sentinel)[name]}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    raw = read_file(path)
    assert not sentinel.exists()
    assert raw.placeholders
    for key, value in weights().items():
        assert torch.equal(raw.tensors[key], value)


def test_object_payload_is_dangerous_elsewhere(tmp_path: Path) -> None:
    for name, payload in object_payloads(tmp_path / "sentinel").items():
        data = pickle.dumps(payload)
        with contextlib.suppress(TypeError):  # some return what their container refuses
            pickle.loads(data)
        assert (tmp_path / "sentinel").exists(), name
        (tmp_path / "sentinel").unlink()


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_that_are_calls_are_refused(tmp_path: Path, zipped: bool) -> None:
    sentinel = tmp_path / "sentinel"
    torch.save(
        {"model": Call(os.system, f"touch {sentinel}")}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(CheckpointError, match="system"):
        load_checkpoint(tmp_path / "a.pth")
    assert not sentinel.exists()


@pytest.mark.parametrize("opcode", [b"\x85", b"]q\x00"])
def test_deep_nesting(tmp_path: Path, opcode: bytes) -> None:
    """As many levels as would exhaust a C stack of 8 MiB by 48 bytes each, as a value and as a dictionary key."""
    levels = 200_000
    nested = b"N" + (opcode * levels if opcode == b"\x85" else b"")
    if opcode != b"\x85":
        nested = b"]" * levels + b"a" * (levels - 1)
    write_zip(tmp_path / "value.pth", b"\x80\x02}" + text("x") + nested + b"s.")
    with pytest.raises(CheckpointError, match="no tensors"):
        read_file(tmp_path / "value.pth")
    write_zip(tmp_path / "key.pth", b"\x80\x02}" + nested + text("x") + b"s.")
    with pytest.raises(CheckpointError):
        read_file(tmp_path / "key.pth")


def test_dictionary_keys_nest_four_levels_at_most() -> None:
    """Deeper ones would be hashed on the C stack, whatever their depth."""

    def keyed(levels: int) -> io.BytesIO:
        return io.BytesIO(b"\x80\x02}N" + b"\x85" * levels + text("x") + b"s.")

    assert pickles.load(keyed(4), lambda pid: pid).value == {((((None,),),),): "x"}
    with pytest.raises(pickles.PickleError, match="dictionary key nested too deeply"):
        pickles.load(keyed(5), lambda pid: pid)


@pytest.mark.parametrize(
    ("opcode", "name"), [(b"\x82\x01", "EXT1"), (b"\x83\x01\x00", "EXT2"), (b"\x97", "NEXT_BUFFER")]
)
def test_an_opcode_without_meaning_here_is_refused(opcode: bytes, name: str) -> None:
    """Left out, the stack would hold one value less than what follows expects, and give another object."""
    with pytest.raises(pickles.PickleError, match=f"pickle opcode {name} does not occur in checkpoints"):
        pickles.load(io.BytesIO(b"\x80\x05}N" + opcode + b"."), lambda pid: pid)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_file(path)


def test_whole_pickled_model_is_refused_by_class_name(tmp_path: Path) -> None:
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear.*state dict"):
        open_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (1, (2, 3), (3, 1)),
        (0, (2, 4), (3, 1)),
        (0, (10**9,), (0,)),
        (-1, (2,), (1,)),
        (0, (2, -3), (3, 1)),
        (0, (2,), (2**61,)),
    ],
)
def test_tensor_outside_its_storage(tmp_path: Path, offset: int, size: tuple, stride: tuple) -> None:
    class Outside:
        def __reduce__(self) -> tuple:
            storage = torch.storage.TypedStorage(
                wrap_storage=torch.arange(6.0).untyped_storage(), dtype=torch.float32, _internal=True
            )
            return torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, {})

    torch.save({"model": {"a": Outside()}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="damaged"):
        read_file(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["../../secret.safetensors", "a" * 5000, "", 3])
def test_shard_names_stay_in_their_folder(tmp_path: Path, name: object) -> None:
    (tmp_path / "unet").mkdir()
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="same folder") as error:
        open_checkpoint(tmp_path)
    assert len(str(error.value)) < 400
