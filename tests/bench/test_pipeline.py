"""The bench of what surrounds the model goes from files to files, and waits for its stand-in device."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vpd_fast.bench import pipeline, plots
from vpd_fast.inference import SegmentationResult, make_predictor

from ..inference.stand_in import StandIn


def test_runs_stages_table_and_chart(tmp_path: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.jpg")
    answer = SegmentationResult(photo, np.zeros((60, 80), np.int64), tuple("abcde"))
    predictor = make_predictor(StandIn(), batch_size=2)
    runs = [
        pipeline.measure(predictor, answer, tmp_path / "photo.jpg", milliseconds, overlay, 6)
        for milliseconds, overlay in ((0, "none"), (20, "jpg"))
    ]
    assert runs[1].images_per_second <= 50 * 1.01  # the device's own
    assert all(run.images_per_second > 0 and run.core_ms > 0 for run in runs)
    by_stage = pipeline.stages(predictor, answer, tmp_path / "photo.jpg", rounds=2)
    assert tuple(by_stage) == pipeline.STAGES
    assert all(spent > 0 for spent in by_stage.values())
    text = pipeline.table(runs, by_stage)
    assert f"| 20 | jpg | {runs[1].images_per_second:.0f} | {runs[1].core_ms:.1f} |" in text
    plots.save(pipeline.chart(runs, by_stage, "here"), tmp_path / "chart.png")
    assert Image.open(tmp_path / "chart.png").size[0] > 600
    found = json.loads(pipeline.as_json(runs, by_stage, {"about": "here"}))
    assert [run["overlay"] for run in found["runs"]] == ["none", "jpg"]
    assert found["stages_core_ms"] == pytest.approx(by_stage)
