"""The weights that come with the package: their format, how they are found, what they know."""

from __future__ import annotations

import json
import shutil
import socket
import zlib

import numpy as np
import pytest
import torch

from vpd_fast import VPD, bundled
from vpd_fast.checkpoints import load_checkpoint, open_checkpoint, reader
from vpd_fast.checkpoints.save import write_bundled
from vpd_fast.cli.main import run
from vpd_fast.config import TASKS
from vpd_fast.data.shapes import CLASSES
from vpd_fast.errors import CheckpointError, InputError
from vpd_fast.models.text import TextEncoder


def test_packing_rounds_to_half_a_step() -> None:
    tensors = {
        "weight": torch.randn(6, 5, 3, 3), "zero": torch.zeros(2, 4), "bias": torch.randn(6), "a.scale": torch.randn(3),
        "bn.running_var": torch.tensor([1e6, 1.0]), "bn.num_batches_tracked": torch.tensor(7),
    }  # fmt: skip
    packed = bundled.pack(tensors)
    assert packed["weight"].dtype == torch.int8
    found = bundled.unpack(packed)
    assert found.keys() == tensors.keys()
    step = tensors["weight"].flatten(1).abs().amax(1) / 127
    assert ((found["weight"] - tensors["weight"]).abs().flatten(1).amax(1) <= step * 0.5001).all()
    assert torch.equal(found["zero"], tensors["zero"])
    # Half a unit in the last place of float16, relative and, near zero, absolute.
    torch.testing.assert_close(found["bias"], tensors["bias"], atol=2.0**-25, rtol=2.0**-11)
    assert torch.equal(found["bn.running_var"], tensors["bn.running_var"])
    assert found["bn.num_batches_tracked"] == 7


def test_a_step_is_relative_to_the_root_mean_square() -> None:
    weight = torch.randn(6, 5, 3, 3)
    weight[0, 0, 0, 0] = 100  # needs a larger scale than the step asks for
    packed = bundled.pack({"weight": weight}, step=0.04)
    smallest = weight.flatten(1).abs().amax(1) / 127
    expected = torch.maximum(weight.flatten(1).square().mean(1).sqrt() * 0.04, smallest)
    torch.testing.assert_close(packed["weight.scale"], expected)
    assert packed["weight.scale"][0] == smallest[0]
    error = (bundled.unpack(packed)["weight"] - weight).abs().flatten(1).amax(1)
    assert (error <= packed["weight.scale"] * 0.5001).all()


def test_all_of_it_is_small_in_a_wheel() -> None:
    files = [path for path in bundled.ASSETS.rglob("*") if path.is_file()]
    assert sum(len(zlib.compress(path.read_bytes())) for path in files) < 8e6


@pytest.mark.parametrize("task", TASKS)
def test_loads_by_name(task: str) -> None:
    model = VPD.from_pretrained(f"shapes-{task}")
    assert model.config.task == task
    assert model.config.text_encoder == "shapes-text"
    assert not model.load_report.missing
    assert not model.load_report.unexpected
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in model.state_dict().values())
    record = open_checkpoint(f"shapes-{task}").metadata["record"]
    assert {"commands", "pretraining", "finetuning", "float32", "8-bit weights"} <= record.keys()
    assert record["finetuning"]["task"] == task
    assert "root" not in record["finetuning"]["data"]  # a place on the machine that trained it


def test_wrong_task_and_wrong_names() -> None:
    with pytest.raises(CheckpointError, match="holds a depth model; expected referring"):
        load_checkpoint("shapes-depth", task="referring")
    with pytest.raises(CheckpointError, match="or one of shapes-segmentation, shapes-referring, shapes-depth"):
        VPD.from_pretrained("shapes-sound")
    with pytest.raises(CheckpointError, match="is a text encoder"):
        load_checkpoint("shapes-text")


def test_a_file_of_that_name_wins(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    VPD.from_pretrained("shapes-depth").save_pretrained("shapes-segmentation")
    assert VPD.from_pretrained("shapes-segmentation").config.task == "depth"


def test_another_folder_of_that_name_does_not_hide_them(tmp_path, monkeypatch) -> None:
    """What `vpd-fast train -o shapes-depth` leaves, for example, has its weights further down."""
    monkeypatch.chdir(tmp_path)
    for name in ("shapes-depth", "shapes-text"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    assert VPD.from_pretrained("shapes-depth").config.task == "depth"
    assert TextEncoder("shapes-text", remember=False).embed_sentences(["the cube"], tokens=24).shape == (1, 24, 96)


def test_no_network(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model = VPD.from_pretrained("shapes-referring")
    assert model.predict(np.zeros((128, 128, 3), np.uint8), text="the red cube").mask.shape == (128, 128)


def test_missing_and_damaged_files_say_what_to_do(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bundled, "ASSETS", tmp_path)
    with pytest.raises(CheckpointError, match="make.sh makes them"):
        VPD.from_pretrained("shapes-segmentation")
    with pytest.raises(CheckpointError, match="make.sh makes them"):
        TextEncoder("shapes-text").embed_sentences(["the cube"], tokens=24)
    assert run(["demo", "-o", str(tmp_path / "demo")]) == 2
    assert "make.sh" in capsys.readouterr().err


def test_damaged_metadata(tmp_path, monkeypatch) -> None:
    from safetensors.torch import save_file

    for name in ("shapes-depth", "shapes-encoder"):
        shutil.copyfile(bundled.asset(name), tmp_path / f"{name}.safetensors")
    monkeypatch.setattr(bundled, "ASSETS", tmp_path)
    raw = reader.read_file(tmp_path / "shapes-depth.safetensors")
    tensors = {key: tensor.clone() for key, tensor in raw.tensors.items()}
    for metadata in ({}, {"vpd_fast_config": "{", "record": "{}"}, {"vpd_fast_config": "{}", "record": "{"}):
        save_file(tensors, tmp_path / "shapes-depth.safetensors", metadata=metadata)
        with pytest.raises(CheckpointError, match="is damaged"):
            VPD.from_pretrained("shapes-depth")


def test_encoders_of_two_sets_are_not_mixed(tmp_path) -> None:
    model = VPD.from_pretrained("shapes-depth")
    write_bundled(tmp_path, "shapes-depth", model.state_dict(), model.config, {})
    write_bundled(tmp_path, "shapes-depth", model.state_dict(), model.config, {})
    with torch.no_grad():
        model.encoder.encoder_vq.quant_conv.weight += 1
    with pytest.raises(CheckpointError, match="encoder of other weights"):
        write_bundled(tmp_path, "shapes-depth", model.state_dict(), model.config, {})


def test_class_embeddings_are_the_bundled_encoders() -> None:
    model = VPD.from_pretrained("shapes-segmentation")
    found = TextEncoder("shapes-text", remember=False).embed_classes(list(CLASSES))
    # Both are rounded: the embeddings in the file, and the encoder's weights.
    assert torch.nn.functional.cosine_similarity(found, model.class_embeddings).min() > 0.99


def test_unknown_words_are_answered_with_the_known_ones(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("VPD_FAST_CACHE", str(tmp_path / "cache"))
    encoder = TextEncoder("shapes-text", remember=False)
    with pytest.raises(InputError, match="does not know dog, lamp; its words are a, an, the, .*pyramid"):
        encoder.embed_sentences(["the cube", "the dog behind the lamp"], tokens=24)
    with pytest.raises(InputError, match="does not know w\u00fcrfel"):
        encoder.embed_sentences(["the W\u00fcrfel"], tokens=24)
    with pytest.raises(InputError, match="does not know sofa"):
        encoder.embed_classes(["cube", "sofa"])
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "grey.png")
    arguments = ["predict", str(tmp_path / "grey.png"), "--checkpoint", "shapes-referring", "-o", str(tmp_path / "out")]
    assert run([*arguments, "--text", "the zebra"]) == 2
    assert "does not know zebra" in capsys.readouterr().err
    assert run([*arguments, "--text", "the red cube"]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["images"]


def test_a_copy_of_the_text_encoder_is_unpacked_as_well(tmp_path) -> None:
    shutil.copytree(bundled.asset("shapes-text"), tmp_path / "copy")
    ours, theirs = (TextEncoder(name, remember=False) for name in ("shapes-text", tmp_path / "copy"))
    text = ["the red cube left of the ring"]
    assert torch.equal(ours.embed_sentences(text, tokens=24), theirs.embed_sentences(text, tokens=24))
    assert ours.identity == theirs.identity


def test_every_release_of_transformers_knows_the_names() -> None:
    """Older ones want the prefix, newer ones take it away."""
    names = reader.read_file(bundled.asset("shapes-text") / "text_encoder" / "model.safetensors").tensors
    assert all(name.startswith("text_model.") for name in names)


def test_training_goes_on_with_the_encoder_of_the_checkpoint() -> None:
    from vpd_fast.training import build
    from vpd_fast.training.config import TrainConfig

    model = VPD.from_pretrained("shapes-referring")
    given = TrainConfig.from_dict({"task": "referring", "init": {"text_encoder": "folder"}})
    assert build.text_encoder(given, model).name == "folder"
    assert build.text_encoder(TrainConfig(task="referring"), model).name == "shapes-text"
    assert build.text_encoder(TrainConfig(task="referring")).name == "openai/clip-vit-large-patch14"


def test_converting_gives_a_usual_folder(tmp_path) -> None:
    assert run(["convert", "shapes-referring", str(tmp_path / "own"), "--to", "pretrained"]) == 0
    ours, theirs = VPD.from_pretrained("shapes-referring"), VPD.from_pretrained(tmp_path / "own")
    assert theirs.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
