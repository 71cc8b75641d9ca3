"""`vpd-fast bench pipeline` beside a stand-in, and with a small model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vpd_fast import VPDConfig
from vpd_fast.cli.main import run


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_a_stand_in(task: str, tmp_path: Path, capsys) -> None:
    found, chart = tmp_path / "new" / "a.json", tmp_path / "a.png"
    command = ["bench", "pipeline", "--task", task, "--device-ms", "0,3.5", "--images", "10", "--rounds", "1"]
    assert run([*command, "--json", str(found), "--chart", str(chart)]) == 0
    printed = capsys.readouterr().out
    values = json.loads(found.read_text())
    kinds = [(run["milliseconds"], run["overlay"]) for run in values["runs"]]
    assert kinds == [(0, "none"), (0, "jpg"), (3.5, "none"), (3.5, "jpg")]
    for row in values["runs"]:
        assert f"| {row['images_per_second']:.0f} | {row['core_ms']:.1f} |" in printed
    assert values["stages_core_ms"]["draw"] > values["stages_core_ms"]["stack"]
    assert values["about"].startswith(f"{task}, ")
    assert values["model_images_per_second"] is None
    assert Image.open(chart).size[0] > 600
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.json", "a.png", "new"]


def test_a_model(tiny_backbone, tmp_path: Path, capsys) -> None:
    config, photo = tmp_path / "config.json", tmp_path / "photo.jpg"
    VPDConfig(num_classes=5, channels=32, base_size=64, backbone=tiny_backbone).save(config)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(photo)
    command = ["bench", "pipeline", "--random-weights", "1", "--config", str(config), "--precision", "int8"]
    command += ["--photo", str(photo), "--images", "10", "--rounds", "1", "--chart", str(tmp_path / "a.png")]
    assert run([*command, "--json", str(tmp_path / "a.json")]) == 0
    values = json.loads((tmp_path / "a.json").read_text())
    alone = values["model_images_per_second"]
    assert [(run["milliseconds"], run["overlay"]) for run in values["runs"]] == [(None, "none"), (None, "jpg")]
    assert values["precision"] == "int8"
    share = values["runs"][0]["images_per_second"] / alone
    assert f"the model alone: {alone:.1f} images/s" in (printed := capsys.readouterr().out)
    assert f"{share:.2f} with overlay none" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device-ms", "2,x"], "--device-ms must be milliseconds separated by commas"),
        (["--device-ms", "-1"], "--device-ms must be milliseconds"),
        (["--images", "3"], "--images"),
        (["--task", "referring"], "--task must be segmentation or depth where no model runs"),
        (["--checkpoint", "shapes-referring"], "a referring model needs sentences"),
        (["--precision", "int8"], "are for a model: give --checkpoint or --random-weights"),
        (["--photo", "/nowhere.jpg"], "/nowhere.jpg"),
        (["--json", "a.txt"], "--json must be a file name that ends in .json"),
        (["--chart", "/proc/a.png"], "--chart /proc: cannot write there"),
    ],
)
def test_bad_input(options: list[str], message: str, capsys) -> None:
    assert run(["bench", "pipeline", *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_options_of_the_command_come_after_its_name(capsys) -> None:
    assert run(["bench", "--size", "64", "pipeline"]) == 2
    assert "options of bench pipeline come after its name" in capsys.readouterr().err
