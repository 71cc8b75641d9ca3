"""Check sums of weights: what is saved has them, and whatever changed afterwards is found and named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import vpd_fast
from vpd_fast import VPD, BackboneConfig, VPDConfig
from vpd_fast.checkpoints import convert, load_checkpoint, verify
from vpd_fast.checkpoints.checksums import checksums
from vpd_fast.cli.main import run
from vpd_fast.errors import CheckpointError
from vpd_fast.models.random_weights import randomize

from ..helpers import runs

BACKBONE = BackboneConfig(
    model_channels=32, context_dim=32, num_heads=4, num_res_blocks=1, channel_mult=(1, 1, 1, 1), vae_ch=32,
    vae_ch_mult=(1, 1, 1, 1), vae_num_res_blocks=1,
)  # fmt: skip
CONFIG = VPDConfig(num_classes=2, base_size=128, channels=32, backbone=BACKBONE)


@pytest.fixture(scope="module")
def model() -> VPD:
    return randomize(VPD.empty(CONFIG), 0).eval()


@pytest.fixture(params=["own", "engine"])
def folder(request: pytest.FixtureRequest, model: VPD, tmp_path: Path) -> Path:
    """A saved model, plain or fast."""
    if request.param == "own":
        model.save_pretrained(tmp_path / "own")
    else:
        vpd_fast.optimize(model, "int8").save(tmp_path / "engine")
    return tmp_path / request.param


def names(folder: Path) -> tuple[Path, Path]:
    """The settings and the weights of a folder."""
    kind = ("engine.json", "engine.safetensors") if folder.name == "engine" else ("config.json", "model.safetensors")
    return folder / kind[0], folder / kind[1]


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    edit(values["checksums"])
    path.write_text(json.dumps(values))


def flip(path: Path, key: str) -> None:
    """One bit of a tensor's last byte."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    end = json.loads(data[8 : 8 + length])[key]["data_offsets"][1]
    data[8 + length + end - 1] ^= 1
    path.write_bytes(data)


def test_a_check_sum_is_of_dtype_shape_and_bytes() -> None:
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = checksums({"b": a.bfloat16(), "a": a})
    assert found["algorithm"] == "sha256"
    expected = {
        "a": hashlib.sha256(b"float32 2x2\n" + a.numpy().tobytes()).hexdigest(),
        "b": hashlib.sha256(b"bfloat16 2x2\n" + b"\x80\x3f\x00\x40\x40\x40\x80\x40").hexdigest(),
    }
    assert found["tensors"] == expected
    lines = "".join(f"{name} {expected[name]}\n" for name in "ab")
    assert found["total"] == hashlib.sha256(lines.encode()).hexdigest()
    assert checksums({"a": a, "b": a.bfloat16()}) == found  # whatever the order
    assert checksums({"a": a.T.contiguous().T})["tensors"]["a"] == expected["a"]  # however it lies in memory
    for other in (a.reshape(4), a.view(torch.int32), a + 1, a.double()):
        assert checksums({"a": other})["tensors"]["a"] != expected["a"]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3), torch.tensor([True, False]), torch.zeros(0, 3), torch.arange(6, dtype=torch.int8)[::2],
        torch.ones(3).to(torch.float8_e4m3fn), torch.tensor([1 + 2j]).conj(), torch._neg_view(torch.ones(2)),
        torch.ones(1).expand(5), torch.zeros(3, requires_grad=True),
    ],
    ids=str,
)  # fmt: skip
def test_tensors_of_all_kinds_have_one(tensor: torch.Tensor, tmp_path: Path) -> None:
    plain = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    assert checksums({"a": tensor}) == checksums({"a": plain})


def test_what_was_saved_is_ok(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int]] = []
    found = verify(folder, lambda *progress: seen.append(progress))
    assert (found.status, found.different) == ("ok", ())
    weights = names(folder)[1]
    assert weights.stat().st_size > found.nbytes > 0.9 * weights.stat().st_size
    assert len(seen) == found.tensors > 100
    assert seen[-1] == (found.nbytes, found.nbytes)
    assert run(["info", "--verify", str(folder)]) == 0
    assert "ok" in capsys.readouterr().out
    assert run(["info", "--json", "--verify", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "ok"


def test_other_ways_to_save(model: VPD, tmp_path: Path, data: Path) -> None:
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "converted", to="pretrained", num_heads=4, base_size=128)
    assert verify(tmp_path / "converted").status == "ok"
    config = runs.tiny("depth", data, schedule={"steps": 1})
    runs.trainer(config, tmp_path / "run").run()
    for name in ("best", "checkpoints/step_000001"):
        assert verify(tmp_path / "run" / name).status == "ok"


def test_a_changed_tensor_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, weights = names(folder)
    key = list(json.loads(settings.read_text())["checksums"]["tensors"])[7]
    flip(weights, key)
    assert verify(folder).different == (key,)
    assert run(["info", "--verify", str(folder)]) == 1
    assert key in capsys.readouterr().err
    assert run(["info", "--json", "--verify", str(folder)]) == 1
    assert json.loads(capsys.readouterr().out)["different"] == [key]
    load = vpd_fast.load_engine if folder.name == "engine" else load_checkpoint
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        load(folder, verify=True)


@pytest.mark.parametrize("damage", ["cut", "missing", "header"])
def test_a_file_that_is_damaged_as_a_whole_is_named(folder: Path, damage: str) -> None:
    weights = names(folder)[1]
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(b"\x00" + weights.read_bytes()[1:])
    found = verify(folder)
    assert found.status == "different"
    assert weights.name in str(found)
    assert run(["info", "--verify", str(folder)]) == 1


def test_tensors_too_many_and_too_few(model: VPD, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tensors = dict(model.state_dict())
    first = next(iter(tensors))
    del tensors[first]
    save_file({**tensors, "more": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert verify(tmp_path).different == tuple(sorted([first, "more"]))


def test_changed_check_sums(folder: Path) -> None:
    settings, _ = names(folder)
    text = settings.read_text()
    change(settings, lambda sums: sums.update(total="0" * 64))
    assert verify(folder).different == (f"the total in {settings.name}",)
    settings.write_text(text)
    change(settings, lambda sums: sums["tensors"].update({"neck": 3}))
    assert verify(folder).different == ("neck",)
    for edit, message in (
        (lambda sums: sums.update(algorithm="md5"), "'md5', expected sha256"),
        (lambda sums: sums.update(tensors=[1]), "checksums.tensors must be"),
        (lambda sums: sums.update(more=1), "checksums.more is not a setting"),
    ):
        settings.write_text(text)
        change(settings, edit)
        with pytest.raises(CheckpointError, match=message):
            verify(folder)
        assert run(["info", "--verify", str(folder)]) == 2
        if folder.name == "own":
            load_checkpoint(folder)  # which does not look at them


def test_none(folder: Path, model: VPD, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, _ = names(folder)
    values = json.loads(settings.read_text())
    del values["checksums"]
    settings.write_text(json.dumps(values))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pth")
    for path in (folder, tmp_path / "a.pth", Path("shapes-depth")):
        assert verify(path).status == "none"
        assert run(["info", "--verify", str(path)]) == 2
        assert "has no check sums" in capsys.readouterr().err
    load = vpd_fast.load_engine if folder.name == "engine" else load_checkpoint
    load(folder)  # as folders of earlier versions
    with pytest.raises(CheckpointError, match="has no check sums"):
        load(folder, verify=True)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        verify(tmp_path / "nothing")


def test_a_plain_and_a_fast_model_in_one_folder(model: VPD, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    vpd_fast.optimize(model, "fp32").save(tmp_path)
    assert verify(tmp_path).status == "ok"
    key = next(iter(json.loads((tmp_path / "engine.json").read_text())["checksums"]["tensors"]))
    flip(tmp_path / "engine.safetensors", key)
    assert verify(tmp_path).different == (key,)
    load_checkpoint(tmp_path, verify=True)
    with pytest.raises(CheckpointError, match="is not what was saved"):
        vpd_fast.load_engine(tmp_path, verify=True)


def test_the_configuration_is_read_without_them(model: VPD, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert VPDConfig.load(tmp_path / "config.json") == CONFIG
