"""The bench of what surrounds the model goes from files to files, and waits for its stand-in device."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vpd_fast.bench import pipeline, plots
from vpd_fast.errors import ImageError
from vpd_fast.inference import SegmentationResult, make_predictor
from vpd_fast.inference.batching import Prepared
from vpd_fast.inference.results import save_picture

from ..inference.stand_in import StandIn


def test_runs_stages_table_and_chart(tmp_path: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.jpg")
    answer = SegmentationResult(photo, np.zeros((60, 80), np.int64), tuple("abcde"))
    predictor = make_predictor(StandIn(), batch_size=2)
    photo_path = tmp_path / "photo.jpg"
    runs = [
        pipeline.measure(pipeline.StandIn(predictor, answer, milliseconds), photo_path, overlay, 6)
        for milliseconds, overlay in ((0, "none"), (20, "jpg"))
    ]
    assert runs[1].images_per_second <= 50 * 1.01  # the device's own
    assert all(run.images_per_second > 0 and run.core_ms > 0 for run in runs)
    assert all(run.grown_mib is not None and abs(run.grown_mib) < 100 for run in runs)
    by_stage = pipeline.stages(predictor, answer, photo_path, rounds=2)
    assert tuple(by_stage) == pipeline.STAGES
    assert all(spent > 0 for spent in by_stage.values())
    text = pipeline.table(runs, by_stage)
    assert f"| 20 | jpg | {runs[1].images_per_second:.0f} | {runs[1].core_ms:.1f} | {runs[1].grown_mib:.0f} |" in text
    plots.save(pipeline.chart(runs, by_stage, "here"), tmp_path / "chart.png")
    assert Image.open(tmp_path / "chart.png").size[0] > 600
    found = json.loads(json.dumps(pipeline.numbers(runs, by_stage, {"about": "here"})))
    assert [run["overlay"] for run in found["runs"]] == ["none", "jpg"]
    assert found["stages_core_ms"] == pytest.approx(by_stage)


def test_a_broken_photo_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"none")
    answer = SegmentationResult(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.int64), ("a", "b"))
    device = pipeline.StandIn(make_predictor(StandIn()), answer, 0)
    with pytest.raises(ImageError, match="00000.jpg"):
        pipeline.measure(device, tmp_path / "photo.jpg", "none", 2)


def test_memory_that_grows_shows(tmp_path: Path) -> None:
    photo = np.zeros((60, 80, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.jpg")
    answer = SegmentationResult(photo, np.zeros((60, 80), np.int64), tuple("abcde"))
    kept = []

    class Leaking(pipeline.StandIn):
        def prepare(self, image: np.ndarray) -> Prepared:
            kept.append(np.ones(2**19))  # 4 MiB
            return super().prepare(image)

    run = pipeline.measure(Leaking(make_predictor(StandIn()), answer, 0), tmp_path / "photo.jpg", "none", 50)
    assert run.grown_mib is not None
    assert run.grown_mib > 60


def test_the_scene_has_the_detail_of_a_photo(tmp_path: Path) -> None:
    photo, labels, depth = pipeline.scene(150)
    assert photo.shape == (480, 640, 3)
    assert 15 < len(np.unique(labels)) <= 24
    assert 0 < depth.min() < depth.max() < pipeline.MAX_DEPTH
    path = save_picture(Image.fromarray(photo), tmp_path / "photo.jpg")
    assert 40e3 < path.stat().st_size < 250e3
