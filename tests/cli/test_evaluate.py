"""`vpd-fast evaluate` on miniature data sets in their real folder formats."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from vpd_fast import VPD, VPDConfig
from vpd_fast.cli.evaluate import SPLITS
from vpd_fast.cli.main import run
from vpd_fast.data import KINDS
from vpd_fast.models.random_weights import randomize

from ..helpers import miniature, processes

FILES = {"metrics.json", "per_image.csv", "worst.html", "worst.png"}
TASKS = {"ade20k": "segmentation", "refcoco": "referring", "nyu": "depth"}


@pytest.fixture
def roots(tmp_path):
    """{kind: where a miniature of it lies}."""
    return {
        "ade20k": miniature.ade20k(tmp_path / "ade", 3),
        "refcoco": miniature.refer(tmp_path / "ref"),
        "nyu": miniature.nyu(tmp_path / "nyu", 3),
        "folder": miniature.folder(tmp_path / "own", "segmentation", 3),
    }


@pytest.fixture
def config(tiny_backbone):
    """`config(task, ...)` of a small model with as many classes and scenes as the released ones."""
    return lambda task, **changes: VPDConfig(
        task=task, tokens=8, channels=32, base_size=64, backbone=tiny_backbone, **changes
    )


@pytest.fixture
def small(tmp_path, config):
    """`small(task)` -> options that build a small random model of that task."""

    def options(task: str, **changes) -> list[str]:
        config(task, **changes).save(tmp_path / f"{task}.json")
        return ["--random-weights", "1", "--config", str(tmp_path / f"{task}.json")]

    return options


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _error(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("kind", TASKS)
def test_evaluate(roots, small, tmp_path, capsys, kind):
    output = tmp_path / "out"
    command = ["evaluate", "--data", kind, "--root", str(roots[kind]), *small(TASKS[kind]), "-o", str(output)]
    assert run([*command, "--worst", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "the weights are random (seed 1)" in printed.out
    assert _names(output) == FILES | ({"per_class.csv"} if kind == "ade20k" else set())
    values = json.loads((output / "metrics.json").read_text())
    assert values["task"] == TASKS[kind]
    assert values["data"]["split"] == SPLITS[kind]
    assert (values["count"], values["failed"], values["processes"]) == (3 if kind != "refcoco" else 2, [], 1)
    rows = list(csv.DictReader((output / "per_image.csv").open(newline="")))
    assert len(rows) == values["rows"] == (4 if kind == "refcoco" else 3)  # two sentences per image
    name = {"ade20k": "mIoU", "refcoco": "oIoU", "nyu": "rmse"}[kind]
    assert name in printed.out
    if kind == "nyu":
        assert sum(float(row["rmse"]) for row in rows) / 3 == pytest.approx(values["metrics"]["rmse"])
        assert values["settings"]["crop"] == "eigen"
        assert "3 of 3 were measured whole" in printed.out
        assert f"{values['metrics']['rmse']:.4f} m" in printed.out
    else:
        assert f"{100 * values['metrics'][name]:.2f} %" in printed.out
    if kind == "refcoco":
        assert any("no text encoder" in note for note in values["notes"])
        union = sum(int(row["union"]) for row in rows)
        assert sum(int(row["intersection"]) for row in rows) / union == values["metrics"]["oIoU"]
    html = (output / "worst.html").read_text()
    assert html.count('<li class="case">') == 2
    Image.open(output / "worst.png").verify()

    assert run([*command, "--json", "--limit", "1", "--worst", "0"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["count"] == 1
    assert printed == json.loads((output / "metrics.json").read_text())


def test_options_reach_the_evaluation(roots, small, tmp_path):
    def settings(kind, *options):
        command = ["evaluate", "--data", kind, "--root", str(roots[kind]), *small(TASKS[kind])]
        assert run([*command, "-o", str(tmp_path / "out"), "--limit", "1", *options]) == 0
        return json.loads((tmp_path / "out" / "metrics.json").read_text())["settings"]

    found = settings("ade20k", "--scales", "0.5,1", "--flip", "--mode", "whole", "--batch-size", "2")
    assert found == {"mode": "whole", "resize_to": 64, "scales": [0.5, 1.0], "flip": True, "batch_size": 2}
    assert settings("refcoco", "--resolution", "original")["resolution"] == "original"
    found = settings("nyu", "--no-flip", "--whole", "--crop", "none")
    assert (found["flip"], found["shift_window"], found["crop"]) == (False, False, "none")


def test_own_folder_and_a_saved_model_in_int8(roots, config, tmp_path, capsys):
    randomize(VPD(config("segmentation", num_classes=5)), 1).save_pretrained(tmp_path / "model")
    command = ["evaluate", "--data", "folder", "--root", str(roots["folder"]), "--checkpoint", str(tmp_path / "model")]
    found = {}
    for name, options in (("plain", []), ("fast", ["--precision", "int8"])):
        assert run([*command, "-o", str(tmp_path / name), *options]) == 0
        found[name] = json.loads((tmp_path / name / "metrics.json").read_text())
        assert "ground" in capsys.readouterr().out  # a row of the table of classes
    assert (found["plain"]["fast"], found["fast"]["fast"]) == (False, True)
    assert found["fast"]["precision"] == "int8"
    assert found["fast"]["metrics"]["aAcc"] == pytest.approx(found["plain"]["metrics"]["aAcc"], abs=0.1)
    rows = list(csv.DictReader((tmp_path / "plain" / "per_class.csv").open(newline="")))
    assert [row["class"] for row in rows][0] == "ground"
    assert sum(int(row["pixels"]) for row in rows) == 3 * 64 * 96


def test_broken_samples_do_not_stop_a_run(roots, small, tmp_path, capsys):
    broken = sorted((roots["ade20k"] / "images" / "validation").iterdir())[1]
    broken.write_bytes(broken.read_bytes()[:200])
    command = ["evaluate", "--data", "ade20k", "--root", str(roots["ade20k"]), *small("segmentation")]
    assert run([*command, "-o", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("failed: ")
    assert broken.name in printed.err
    assert "2 images (1 failed)" in printed.out
    assert len(json.loads((tmp_path / "out" / "metrics.json").read_text())["failed"]) == 1
    assert run([*command, "-o", str(tmp_path / "strict"), "--strict"]) == 2
    assert broken.name in _error(capsys)
    assert _names(tmp_path / "strict") == set()


@pytest.mark.parametrize(
    ("kind", "task", "options", "message"),
    [
        ("ade20k", "depth", [], "the data set is for segmentation, the model for depth"),
        ("folder", "segmentation", [], "the model has 150 classes, the data set 5"),
        ("ade20k", "segmentation", ["--root", "nowhere"], "nowhere"),
        ("ade20k", "segmentation", ["--split", "testing"], "testing"),
        ("ade20k", "segmentation", ["--split-by", "unc"], "--split-by is not for --data ade20k"),
        ("ade20k", "segmentation", ["--scene-rule", "fixed"], "--scene-rule is not for --data ade20k"),
        ("ade20k", "segmentation", ["--crop", "eigen"], "segmentation has no option crop"),
        ("ade20k", "segmentation", ["--scales", "big"], "--scales must be numbers"),
        ("ade20k", "segmentation", ["--limit", "0"], "limit must be an int of at least 1"),
        ("ade20k", "segmentation", ["--text-encoder", "clip"], "--text-encoder is for referring models"),
        ("ade20k", "segmentation", ["--data", "coco"], "--data must be one of ade20k, refcoco"),
        ("nyu", "depth", ["--crop", "big"], "crop must be one of eigen"),
        ("refcoco", "referring", ["--resolution", "big"], "resolution must be one of resized, original"),
    ],
)
def test_wrong_input(roots, small, tmp_path, capsys, kind, task, options, message):
    command = ["evaluate", "--data", kind, "--root", str(roots[kind]), *small(task), "-o", str(tmp_path / "out")]
    assert run([*command, *options]) == 2
    assert message in _error(capsys)
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_kinds_are_those_of_the_data_sets():
    assert set(SPLITS) == set(KINDS)


def test_in_a_group_of_two(roots, small, tmp_path):
    """In torchrun's environment one process writes and prints, and what it writes is what a single process writes."""
    command = ["evaluate", "--data", "ade20k", "--root", str(roots["ade20k"]), *small("segmentation")]
    processes.run_together(run, [([*command, "-o", str(tmp_path / "two")],)] * 2, tmp_path / "log", 200)
    assert "written to" in (tmp_path / "log0").read_text()
    assert "written to" not in (tmp_path / "log1").read_text()
    assert run([*command, "-o", str(tmp_path / "one")]) == 0
    values = {name: json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")}
    assert (values["two"]["processes"], values["one"]["processes"]) == (2, 1)
    assert values["two"]["metrics"] == values["one"]["metrics"]
    for table in ("per_image.csv", "per_class.csv", "worst.html"):
        assert (tmp_path / "two" / table).read_bytes() == (tmp_path / "one" / table).read_bytes()


def test_options_of_the_data_set(roots, small, tmp_path, capsys):
    common = ["evaluate", "--data", "folder", "--task", "segmentation", *small("segmentation", num_classes=2)]
    root = miniature.folder(tmp_path / "pairs", "segmentation", 2)
    (root / "classes.txt").write_text("ground\nbox\n")
    for path in (root / "masks/val").iterdir():
        with Image.open(path) as image:
            mask = image.point(lambda label: 255 if label else 0)
        mask.save(path)
    common += ["--root", str(root), "-o", str(tmp_path / "out"), "--worst", "0", "--json"]
    assert run(common) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert any("classes have no pixel in the masks: box" in note for note in notes)
    assert any("--data-option binary=true" in note for note in notes)
    assert run([*common, "--data-option", "binary=true", "--data-option", "exif=false"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert not any("no pixel" in note for note in values["notes"])
    assert (values["data"]["binary"], values["data"]["exif"]) == (True, False)
    for option, message in (
        ("binary", "--data-option must be NAME=VALUE, got 'binary'"),
        ("depth_scale=many", "depth_scale must be units per metre, above 0 (1000 for millimetres), got 'many'"),
        ("colour=1", "unexpected keyword argument 'colour'"),
    ):
        assert run([*common, "--data-option", option]) == 2
        assert message in _error(capsys)


@pytest.mark.parametrize("broken", [False, True])
def test_a_mask_whose_name_is_not_utf8(roots, small, tmp_path, capsys, broken):
    names = [os.fsencode(roots["folder"]) + b"/%s/val/caf\xe9.png" % kind for kind in (b"images", b"masks")]
    for place, name in zip(("images", "masks"), names, strict=True):
        os.rename(roots["folder"] / place / "val/val_0.png", name)
    if broken:
        with open(names[1], "wb") as file:
            file.write(b"broken")
    command = ["evaluate", "--data", "folder", "--root", str(roots["folder"]), *small("segmentation", num_classes=5)]
    assert run([*command, "-o", str(tmp_path / "out")]) == int(broken)
    values = json.loads((tmp_path / "out/metrics.json").read_text("utf-8", "surrogateescape"))
    assert [row["name"] for row in values["failed"]] == ["val/caf\udce9"] * broken
    assert values["count"] == 3 - broken
    assert (b"caf\xe9" in (tmp_path / "out/per_image.csv").read_bytes()) != broken
