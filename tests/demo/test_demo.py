"""The demo: its numbers, its picture, its command."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from vpd_fast.cli.main import run
from vpd_fast.config import TASKS
from vpd_fast.data.shapes import CLASSES, ShapesDataset, make_scene
from vpd_fast.demo import contact_sheet, run_demo, sheet
from vpd_fast.demo.run import _agreement, _with_one_sentence
from vpd_fast.errors import InputError
from vpd_fast.evaluation import panels
from vpd_fast.pictures import canvas


@pytest.fixture(scope="module", autouse=True)
def _own_cache_and_few_rounds(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vpd_fast.demo.run.ROUNDS", 1)  # of timing, of which nothing is expected here
        patch.setattr("vpd_fast.demo.run.BATCH", 1)
        patch.setenv("VPD_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def demo():
    told = []
    done = run_demo(4, first=3, precision="bf16", pictures=2, report=told.append)
    assert any("segmentation" in text for text in told)
    return done


def test_reports(demo) -> None:
    assert tuple(report.task for report in demo.reports) == tuple(TASKS)
    for report in demo.reports:
        assert report.agreement > 0.9
        assert report.plain_ms > 0
        assert report.speedup == pytest.approx(report.plain_ms / report.fast_ms)
    segmentation, referring, depth = demo.reports
    assert (segmentation.metric, referring.metric, depth.metric) == ("mIoU", "oIoU", "rmse")
    assert segmentation.plain > 0.5  # four scenes: a sign of life, not a measurement
    assert depth.plain < 1.0


def test_sheet_shows_what_was_predicted(demo) -> None:
    pixels = np.asarray(contact_sheet(demo)).astype(int)
    bar = canvas.FONT_SIZE + 14

    def tile(row: int, column: int) -> np.ndarray:
        top = sheet.MARGIN + 40 + row * (sheet.TILE + bar + sheet.GAP) + bar
        left = sheet.MARGIN + column * (sheet.TILE + sheet.GAP)
        return pixels[top : top + sheet.TILE, left : left + sheet.TILE]

    assert tile(1, 5).shape == (sheet.TILE, sheet.TILE, 3)
    for row in range(2):
        shown = demo.shown[row]
        assert np.array_equal(shown["segmentation"][0].image, shown["depth"][0].image)
        if make_scene(3 + row, "test").sentences:  # else the referring model looks at another scene
            assert np.array_equal(shown["segmentation"][0].image, shown["referring"][0].image)
        scene = demo.shown[row]["segmentation"][0].image
        resized = np.asarray(Image.fromarray(scene).resize((sheet.TILE, sheet.TILE)))
        assert np.abs(tile(row, 0) - resized).mean() < 8
        labels = demo.shown[row]["segmentation"][1].labels
        drawn = panels.segmentation(scene, labels, np.zeros_like(labels), CLASSES).panels[1][1]
        expected = np.asarray(drawn.resize((sheet.TILE, sheet.TILE), Image.Resampling.LANCZOS))
        assert np.array_equal(tile(row, 1), expected)
        for a, b in itertools.combinations(range(6), 2):
            assert np.abs(tile(row, a) - tile(row, b)).mean() > 3, (a, b)


def test_sentences_of_all_kinds_are_asked(demo) -> None:
    sample = ShapesDataset(None, "test", task="referring", length=3).load(0)
    asked = {_with_one_sentence(sample, turn).sentences for turn in range(8)}
    assert asked == {(sentence,) for sentence in sample.sentences}
    assert len(asked) > 1
    plain = ShapesDataset(None, "test", task="depth", length=1).load(0)
    assert _with_one_sentence(plain, 3) is plain


def test_agreement_by_hand() -> None:
    yes, no = np.array([[True, True]]), np.array([[False, False]])
    assert _agreement("referring", no, no) == 1
    assert _agreement("referring", yes, np.array([[True, False]])) == 0.5
    assert _agreement("segmentation", np.array([[1, 2, 3, 4]]), np.array([[1, 2, 3, 0]])) == 0.75
    assert _agreement("depth", np.array([[2.0, 4.0]]), np.array([[2.2, 4.0]])) == pytest.approx(0.95)


def test_command(demo, tmp_path, capsys, monkeypatch) -> None:
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
    options = {}
    monkeypatch.setattr("vpd_fast.cli.demo.run_demo", lambda scenes, **others: options.update(others) or demo)
    assert run(["demo", "-o", str(folder), "--scenes", "1", "--split", "unseen", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["split"] == options["split"] == "unseen"


def test_bad_input(tmp_path, capsys) -> None:
    for wrong in ({"scenes": 0}, {"pictures": 0}, {"first": -1}):
        with pytest.raises(InputError, match="at least one scene"):
            run_demo(**wrong)
    assert run(["demo", "-o", str(tmp_path), "--precision", "int4"]) == 2
    assert "precision must be one of fp32, bf16, int8, got 'int4'" in capsys.readouterr().err
    assert run(["demo", "-o", str(tmp_path), "--split", "val"]) == 2
    assert "train, validation, test, unseen, got 'val'" in capsys.readouterr().err
