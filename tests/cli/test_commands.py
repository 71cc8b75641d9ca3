"""The commands on small random models: what they write, print and return."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vpd_fast import VPD, VPDConfig, __version__
from vpd_fast.cli.main import run
from vpd_fast.errors import TruncationWarning
from vpd_fast.models.random_weights import randomize


@pytest.fixture
def small(tmp_path, tiny_backbone):
    """`small(task)` -> options that build a small random model of that task."""

    def options(task: str) -> list[str]:
        path = tmp_path / f"{task}.json"
        config = VPDConfig(
            task=task, num_classes=5, num_scenes=3, tokens=8, channels=32, base_size=128, backbone=tiny_backbone
        )
        config.save(path)
        return ["--random-weights", "1", "--config", str(path)]

    return options


@pytest.fixture
def photo(tmp_path):
    """A picture of 100x70 pixels."""
    return _photo(tmp_path / "images" / "photo.jpg")


def _photo(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (7, 10, 3), np.uint8)
    Image.fromarray(pixels).resize((100, 70), Image.Resampling.BICUBIC).save(path)
    return path


def _results(output: Path, name: str = "results.json") -> dict:
    return json.loads((output / name).read_text())


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_predict_segmentation(small, photo, tmp_path, capsys):
    output = tmp_path / "new" / "out"
    command = ["predict", str(photo), *small("segmentation"), "-o", str(output), "--flip", "--scales", "0.5,1"]
    assert run([*command, "--probabilities"]) == 0
    files = {"photo.png", "photo_overlay.jpg", "photo_probabilities.npy"}
    assert _names(output) == files | {"results.json"}
    labels = np.asarray(Image.open(output / "photo.png"))
    probabilities = np.load(output / "photo_probabilities.npy")
    assert labels.shape == (70, 100)
    assert probabilities.shape == (5, 70, 100)
    assert np.array_equal(probabilities.argmax(0), labels)
    assert min(Image.open(output / "photo_overlay.jpg").size) >= 70

    results = _results(output)
    assert results["task"] == "segmentation"
    assert results["random_weights"] == 1
    assert any("random" in note for note in results["notes"])
    assert results["peak_memory_bytes"] > 2**26
    (record,) = results["images"]
    assert (record["image"], record["width"], record["height"]) == (str(photo), 100, 70)
    assert record["seconds"] > 0
    assert set(record["files"]) == files
    shares = {c["label"]: c["percent"] for c in record["classes"]}
    counts = np.bincount(labels.ravel(), minlength=5)
    assert shares == {i: pytest.approx(count / 70, abs=1e-2) for i, count in enumerate(counts) if count}
    assert all(c["name"] == f"class {c['label']}" for c in record["classes"])

    printed = capsys.readouterr()
    assert "the weights are random (seed 1)" in printed.out
    assert printed.out.splitlines()[-1].startswith("1 image, ")
    assert "s per image, peak memory" in printed.out
    assert printed.err == ""


def test_predict_is_repeatable_and_depends_on_the_seed(small, photo, tmp_path):
    options = small("segmentation")
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        options[1] = seed
        assert run(["predict", str(photo), *options, "-o", str(tmp_path / name)]) == 0
    first, again, other = ((tmp_path / name / "photo.png").read_bytes() for name in "abc")
    assert first == again
    assert first != other


def test_attention_backend(small, photo, tmp_path):
    """Other arithmetic, the same results but for rounding; the file tells which it was."""
    found = {}
    for command, name in (("predict", "results.json"), ("maps", "maps.json")):
        for backend in ("plain", "sdpa"):
            output = tmp_path / command / backend
            options = [] if backend == "plain" else ["--attention-backend", backend]
            assert run([command, str(photo), *small("segmentation"), "-o", str(output), *options]) == 0
            results = _results(output, name)
            assert results["attention_backend"] == backend
            found[command, backend] = results["images"][0]
    labels = [np.asarray(Image.open(tmp_path / "predict" / name / "photo.png")) for name in ("plain", "sdpa")]
    assert (labels[0] == labels[1]).mean() >= 0.999
    for plain, fused in zip(found["maps", "plain"]["maps"], found["maps", "sdpa"]["maps"], strict=True):
        assert fused == {"name": plain["name"], **{k: pytest.approx(plain[k], rel=1e-3) for k in ("mean", "max")}}


def test_predict_depth(small, photo, tmp_path):
    pictures = {}
    for scene in ("0", "scene 1", None):
        output = tmp_path / str(scene)
        options = [] if scene is None else ["--scene", scene]
        assert run(["predict", str(photo), *small("depth"), "-o", str(output), "--no-flip", *options]) == 0
        pictures[scene] = np.asarray(Image.open(output / "photo.png"))
        metres = _results(output)["images"][0]["metres"]
        assert pictures[scene].dtype == np.uint16
        assert pictures[scene].min() == round(metres["min"] * 1000)
        assert pictures[scene].max() == round(metres["max"] * 1000)
        assert pictures[scene].mean() == pytest.approx(metres["mean"] * 1000, abs=1)
    assert not np.array_equal(pictures["0"], pictures["scene 1"])
    assert not np.array_equal(pictures["0"], pictures[None])


def test_predict_referring_with_several_sentences(small, photo, tmp_path, capsys):
    command = ["predict", str(photo), *small("referring"), "-o", str(tmp_path / "out")]
    assert run([*command, "--text", "left dog", "--text", "cat", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == _results(tmp_path / "out")
    assert any("no text encoder" in note for note in printed["notes"])
    (record,) = printed["images"]
    assert [mask["text"] for mask in record["masks"]] == ["left dog", "cat"]
    assert record["files"] == ["photo_1.png", "photo_2.png", "photo_overlay.jpg"]
    masks = [np.asarray(Image.open(tmp_path / "out" / f"photo_{i}.png")) for i in (1, 2)]
    assert [int((mask > 0).sum()) for mask in masks] == [mask["pixels"] for mask in record["masks"]]
    assert not np.array_equal(*masks)
    # A sentence's mask does not depend on what else is asked.
    assert run([*command[:-1], str(tmp_path / "one"), "--text", "cat"]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "one" / "photo.png")), masks[1])


def test_predict_from_a_saved_model(photo, tmp_path, small, tiny_backbone):
    assert run(["predict", str(photo), *small("segmentation"), "-o", str(tmp_path / "random")]) == 0
    config = VPDConfig.load(tmp_path / "segmentation.json").replace(class_names=("a", "b", "c", "d", "e"))
    randomize(VPD.empty(config), 1).save_pretrained(tmp_path / "model")
    command = ["predict", str(photo), "--checkpoint", str(tmp_path / "model"), "-o", str(tmp_path / "saved")]
    assert run([*command, "--task", "segmentation"]) == 0
    same = [(tmp_path / name / "photo.png").read_bytes() for name in ("random", "saved")]
    assert same[0] == same[1]
    results = _results(tmp_path / "saved")
    assert results["checkpoint"] == str(tmp_path / "model")
    assert results["notes"] == []
    assert {c["name"] for c in results["images"][0]["classes"]} <= set("abcde")


def test_folders_globs_and_equal_names(small, tmp_path):
    for name in ("a/cat.jpg", "a/dog.png", "a/notes.txt", "b/cat.jpg", "b/deep/cat_overlay.png", "b/deep/cat.PNG"):
        path = tmp_path / name
        if path.suffix == ".txt":
            path.write_text("not an image, and not asked for")
        else:
            _photo(path)
    output = tmp_path / "out"
    sources = [str(tmp_path / "a"), str(tmp_path / "b" / "**" / "*"), str(tmp_path / "b" / ".." / "a" / "cat.jpg")]
    assert run(["predict", *sources, *small("segmentation"), "-o", str(output), "--mode", "whole"]) == 0
    records = _results(output)["images"]
    assert [Path(record["image"]).relative_to(tmp_path).as_posix() for record in records] == [
        "a/cat.jpg", "a/dog.png", "b/cat.jpg", "b/deep/cat.PNG", "b/deep/cat_overlay.png",
    ]  # fmt: skip
    written = [name for record in records for name in record["files"]]
    assert len(written) == len(set(written)) == 10
    assert written[:2] == ["a/cat.jpg.png", "a/cat.jpg_overlay.jpg"]
    assert {p.relative_to(output).as_posix() for p in output.rglob("*.*")} == {*written, "results.json"}
    # In one folder, but cat_overlay.png would be written twice.
    assert run(["predict", str(tmp_path / "b" / "deep"), *small("segmentation"), "-o", str(tmp_path / "deep")]) == 0
    assert "cat_overlay.png.png" in _names(tmp_path / "deep")


def test_broken_images_do_not_stop_a_run(small, photo, tmp_path, capsys):
    (photo.parent / "broken.jpg").write_bytes(photo.read_bytes()[:300])
    (photo.parent / "empty.png").touch()
    _photo(photo.parent / "zebra.png")
    output = tmp_path / "out"
    assert run(["predict", str(photo.parent), *small("segmentation"), "-o", str(output)]) == 1
    assert {"photo.png", "zebra.png"} < _names(output)
    assert "broken.png" not in _names(output)
    errors = {Path(r["image"]).name: r["error"] for r in _results(output)["images"] if "error" in r}
    assert set(errors) == {"broken.jpg", "empty.png"}
    printed = capsys.readouterr()
    assert [line.split(":")[0] for line in printed.err.splitlines()] == ["failed", "failed"]
    assert "broken.jpg: cannot read the image" in printed.err
    assert "empty.png: cannot read the image, the file is empty" in printed.err
    assert "2 images (2 failed), " in printed.out


def test_maps_of_classes(small, photo, tmp_path):
    output = tmp_path / "out"
    command = ["maps", str(photo), *small("segmentation"), "-o", str(output)]
    assert run([*command, "--classes", "class 3,0", "--separate"]) == 0
    record = _results(output, "maps.json")["images"][0]
    assert [m["name"] for m in record["maps"]] == ["class 3", "class 0"]
    assert record["files"] == ["photo_maps.png", "photo_maps/003_class_3.png", "photo_maps/000_class_0.png"]
    for name in record["files"]:
        Image.open(output / name).verify()
    assert all(0 < m["mean"] < m["max"] <= 1 for m in record["maps"])

    assert run([*command, "--top", "5"]) == 0
    strongest = _results(output, "maps.json")["images"][0]["maps"]
    means = [m["mean"] for m in strongest]
    assert len(means) == 5
    assert sum(means) == pytest.approx(1, abs=1e-4)  # attention over all five classes
    assert means == sorted(means, reverse=True)


def test_maps_of_sentences(small, photo, tmp_path):
    output = tmp_path / "out"
    command = ["maps", str(photo), *small("referring"), "-o", str(output), "--text", "dog", "--text", "cat"]
    assert run([*command, "--top", "3"]) == 0
    record = _results(output, "maps.json")["images"][0]
    assert record["files"] == ["photo_maps_1.png", "photo_maps_2.png"]
    assert [s["text"] for s in record["sentences"]] == ["dog", "cat"]
    assert [len(s["maps"]) for s in record["sentences"]] == [3, 3]
    assert record["sentences"][0]["maps"] != record["sentences"][1]["maps"]


def test_maps_of_the_words_of_a_sentence(small, photo, tmp_path, monkeypatch):
    class Encoder:
        def __init__(self, name, device):
            assert name == "my/clip"

        def embed_sentences(self, sentences, tokens):
            return torch.randn(len(sentences), tokens, 64, generator=torch.Generator().manual_seed(0))

        def token_names(self, sentence, tokens):
            words = ["<start>", *sentence.split(), "<end>"]
            return words + ["<pad>"] * (tokens - len(words))

    monkeypatch.setattr("vpd_fast.models.text.TextEncoder", Encoder)
    command = ["maps", str(photo), *small("referring"), "-o", str(tmp_path / "out"), "--text-encoder", "my/clip"]
    assert run([*command, "--text", "the dog left of the cat"]) == 0
    results = _results(tmp_path / "out", "maps.json")
    assert results["notes"] == ["the weights are random (seed 1): the pictures mean nothing"]
    (sentence,) = results["images"][0]["sentences"]
    assert [m["name"] for m in sentence["maps"]] == ["the", "dog", "left", "of", "the (2)", "cat"]
    assert _names(tmp_path / "out") == {"photo_maps.png", "maps.json"}


def test_words_are_drawn_whole_and_those_that_are_cut_off_are_told(small, photo, tmp_path, monkeypatch, capsys):
    class Encoder:
        def __init__(self, name, device):
            pass

        def embed_sentences(self, sentences, tokens):
            warnings.warn("is told as a note", TruncationWarning, stacklevel=2)
            return torch.randn(len(sentences), tokens, 64, generator=torch.Generator().manual_seed(0))

        def token_names(self, sentence, tokens):
            return ["<start>", "a", "uni", "corn", "<end>", *["<pad>"] * (tokens - 5)]

        def word_tokens(self, sentence, tokens):
            return [("a", range(1, 2)), ("unicorn", range(2, 4))]

        def sentence_notes(self, sentences, tokens):
            return [f"'ring' left out of {len(sentences)} for {tokens}"]

    monkeypatch.setattr("vpd_fast.models.text.TextEncoder", Encoder)
    options = [str(photo), *small("referring"), "--text-encoder", "my/clip", "--text", "a unicorn ring"]
    for command, more, names in (
        ("predict", [], None),
        ("maps", ["--separate"], ["a", "unicorn"]),
        ("maps", ["--tokens"], ["a", "uni", "corn"]),
    ):
        output = tmp_path / f"{command}{len(more)}"
        assert run([command, *options, *more, "-o", str(output)]) == 0
        results = _results(output, "results.json" if names is None else "maps.json")
        assert results["notes"][-1] == "'ring' left out of 1 for 8"
        printed = capsys.readouterr()
        assert "note: 'ring' left out of 1 for 8" in printed.out
        assert "is told as a note" not in printed.err
        if names is not None:
            (sentence,) = results["images"][0]["sentences"]
            assert [drawn["name"] for drawn in sentence["maps"]] == names
        if more == ["--separate"]:
            assert results["images"][0]["files"][1:] == ["photo_maps/001_a.png", "photo_maps/002_unicorn.png"]


def test_depth_beyond_16_bit_millimetres_is_told(photo, tmp_path, capsys, tiny_backbone):
    config = VPDConfig(task="depth", base_size=64, num_scenes=3, max_depth=80.0, backbone=tiny_backbone)
    config.save(tmp_path / "depth.json")
    command = ["predict", str(photo), "--random-weights", "1", "--config", str(tmp_path / "depth.json"), "--no-flip"]
    assert run([*command, "-o", str(tmp_path / "out")]) == 0
    note = "depths up to 80 m do not fit into 16-bit millimetres: the PNGs have 256 levels per metre"
    assert f"note: {note}" in capsys.readouterr().out
    results = _results(tmp_path / "out")
    assert note in results["notes"]
    (record,) = results["images"]
    assert record["depth_scale"] == 256
    stored = np.asarray(Image.open(tmp_path / "out" / "photo.png")).max() / 256
    assert stored == pytest.approx(record["metres"]["max"], abs=1 / 256)


def test_convert(small, tmp_path, capsys, tiny_backbone):
    config = VPDConfig(task="referring", tokens=8, base_size=128, backbone=tiny_backbone)
    randomize(VPD.empty(config), 0).save_pretrained(tmp_path / "model")
    file = tmp_path / "model.pth"
    assert run(["convert", str(tmp_path / "model"), str(file), "--to", "vpd"]) == 0
    assert str(file) in capsys.readouterr().out
    loaded = VPD.from_checkpoint(file)
    assert loaded.config == config
    assert run(["convert", str(file), str(tmp_path / "half"), "--to", "pretrained", "--dtype", "bf16"]) == 0
    half = (tmp_path / "half" / "model.safetensors").stat().st_size
    assert half == pytest.approx((tmp_path / "model" / "model.safetensors").stat().st_size / 2, rel=0.05)


def test_info(capsys):
    assert run(["info"]) == 0
    assert __version__ in capsys.readouterr().out
    assert run(["info", "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_version_and_help(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"vpd-fast {__version__}\n"
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("predict", "maps", "convert", "info"))
    for command in ("predict", "maps", "convert", "info"):
        assert run([command, "--help"]) == 0
        assert "Usage: vpd-fast " + command in capsys.readouterr().out


def test_program_exits_with_the_code_and_leaves_what_is_done_when_interrupted(small, tmp_path):
    for i in range(200):
        _photo(tmp_path / "images" / f"{i:03d}.png")
    program = [sys.executable, "-m", "vpd_fast.cli.main", "predict"]
    arguments = [str(tmp_path / "images"), *small("segmentation"), "-o", str(tmp_path / "out")]
    # Started in the background of a shell, this process ignores the signal, and so would its child.
    restore = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([*program, *arguments], **pipes, preexec_fn=restore)
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "out").glob("*_overlay.jpg")) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert 1 <= len(_results(tmp_path / "out")["images"]) < 200
    assert not [name for name in _names(tmp_path / "out") if name.startswith(".")]
