"""The demo: its numbers, its picture, its command."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from vpd_fast.cli.main import run
from vpd_fast.config import TASKS
from vpd_fast.demo import contact_sheet, run_demo
from vpd_fast.errors import InputError


@pytest.fixture(scope="module")
def demo():
    told = []
    done = run_demo(4, first=3, precision="bf16", pictures=2, report=told.append)
    assert any("segmentation" in text for text in told)
    return done


def test_reports(demo) -> None:
    assert tuple(report.task for report in demo.reports) == TASKS
    for report in demo.reports:
        assert report.agreement > 0.9
        assert report.plain_ms > 0
        assert report.speedup == pytest.approx(report.plain_ms / report.fast_ms)
    segmentation, referring, depth = demo.reports
    assert (segmentation.metric, referring.metric, depth.metric) == ("mIoU", "oIoU", "rmse")
    assert segmentation.plain > 0.5  # four scenes: a sign of life, not a measurement
    assert depth.plain < 1.0


def test_sheet_shows_what_was_predicted(demo) -> None:
    sheet = contact_sheet(demo)
    assert sheet.width > sheet.height / 2
    pixels = np.asarray(sheet)
    assert len(demo.shown) == 2
    assert pixels.std() > 20
    # Scenes differ, so their rows do.
    half = pixels.shape[0] // 2
    assert np.abs(pixels[40:half].astype(int)[:100] - pixels[half : half + 100]).mean() > 1


def test_command(tmp_path, capsys) -> None:
    folder = tmp_path / "demo"
    assert run(["demo", "-o", str(folder), "--scenes", "2", "--precision", "fp32"]) == 0
    out = capsys.readouterr().out
    assert "segmentation" in out
    assert "speed-up" in out
    record = json.loads((folder / "demo.json").read_text())
    assert [task["task"] for task in record["tasks"]] == list(TASKS)
    assert record["precision"] == "fp32"
    for task in record["tasks"]:
        assert task["agreement"] > 0.999
    assert Image.open(folder / "sheet.png").size[0] > 1000
    assert run(["demo", "-o", str(folder), "--scenes", "1", "--split", "unseen", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["split"] == "unseen"


def test_bad_input(tmp_path, capsys) -> None:
    with pytest.raises(InputError, match="at least one scene"):
        run_demo(0)
    assert run(["demo", "-o", str(tmp_path), "--precision", "int4"]) == 2
    assert "--precision must be fp32, bf16 or int8, got 'int4'" in capsys.readouterr().err
    assert run(["demo", "-o", str(tmp_path), "--split", "val"]) == 2
    assert "train, validation, test, unseen, got 'val'" in capsys.readouterr().err
