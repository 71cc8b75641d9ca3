"""Rows, tables and pictures of what was measured."""

from __future__ import annotations

import json
import math
import sys

import pytest
from matplotlib.colors import to_hex
from PIL import Image
from rich.console import Console

from vpd_fast.bench.plots import COLOURS, FAILED, save, stage_bars
from vpd_fast.bench.report import remarks, row_of, table
from vpd_fast.bench.runner import Measurement
from vpd_fast.bench.variants import Case
from vpd_fast.errors import MissingDependencyError

PLAIN = {"encoder": 0.6, "unet": 0.3, "head": 0.06, "post": 0.04}
FAST = {"encoder": 0.1, "unet": 0.1, "head": 0.03, "post": 0.02}
AGREES = {"latents": 0.99999, "features": [0.99991, 0.99995], "logits": 0.99999, "labels": 0.9875}
CASE = Case(128, batch=2)
MIB = 1 << 20


def measured(variant: str = "fast fp32", seconds=FAST, **changes) -> Measurement:
    values = {
        "seconds": [seconds, seconds, seconds],
        "baseline_seconds": [PLAIN, PLAIN, {k: 2 * v for k, v in PLAIN.items()}],
        "agreement": AGREES,
        "memory": {"run": 512 * MIB, "build": 700 * MIB},
    }
    return Measurement(CASE, variant, "plain", **{**values, **changes})


def baseline() -> Measurement:
    return measured("plain", PLAIN, baseline_seconds=[PLAIN] * 3, agreement=None)


def rows() -> list[dict]:
    below = AGREES | {"logits": 0.9}
    other = {k: FAST[k] for k in ("encoder", "unet")}
    found = [
        baseline(),
        measured(memory={"run": 512 * MIB, "build": 700 * MIB, "loaded": 300 * MIB}),
        measured("fast bf16", agreement=below),
        measured("openvino-fp32", other, agreement={"latents": 1.0, "features": [0.99999]}),
        Measurement(CASE, "fast int8", "plain", error="not enough memory"),
    ]
    return [row_of(m, "segmentation", 2) for m in found]


def text_of(shown: object) -> str:
    console = Console(width=250, color_system=None, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(shown)
    return console.export_text()


def test_row() -> None:
    row = row_of(measured(), "segmentation", 2)
    assert row == {
        "case": "2x3x128x128",
        "task": "segmentation",
        "variant": "fast fp32",
        "threads": 2,
        "parity": "passed",
        "gate": 0.9999,
        "cosines": {"latents": 0.99999, "features": [0.99991, 0.99995], "logits": 0.99999},
        "equal_labels": 0.9875,
        "peak_mib": {"run": 512.0, "build": 700.0},
        "rounds": 3,
        "p20_ms": 250.0,
        "p50_ms": 250.0,
        "p80_ms": 250.0,
        "ms_per_image": 125.0,
        "stages_ms": {"encoder": 100.0, "unet": 100.0, "head": 30.0, "post": 20.0},
        "backbone_ms": 200.0,
        "over": "plain",
        "speedup": 4.0,
        "backbone_speedup": 4.5,
        "stage_speedups": {"encoder": 6.0, "unet": 3.0, "head": 2.0, "post": 2.0},
    }
    json.dumps(row, allow_nan=False)


def test_the_baseline_is_its_own_measure() -> None:
    row = row_of(baseline(), "segmentation", 2)
    assert (row["speedup"], row["backbone_speedup"]) == (1.0, 1.0)
    assert not {"parity", "cosines"} & set(row)


@pytest.mark.parametrize("bad", [0.9998, math.nan])
@pytest.mark.parametrize("where", ["features", "logits"])
def test_no_speedup_below_the_gate(bad: float, where: str) -> None:
    found = AGREES | ({"features": [1.0, bad]} if where == "features" else {"logits": bad})
    row = row_of(measured(agreement=found), "segmentation", 2)
    assert row["parity"] == "failed"
    assert not [name for name in row if "speedup" in name]
    assert row["p50_ms"] == 250.0


def test_the_gate_is_the_precisions() -> None:
    found = AGREES | {"features": [0.9992]}
    for variant, verdict in (("fast fp32", "failed"), ("fast bf16", "passed"), ("openvino-bf16", "passed")):
        assert row_of(measured(variant, agreement=found), "segmentation", 2)["parity"] == verdict


def test_without_a_baseline_nothing_is_claimed() -> None:
    row = row_of(measured(agreement=None, baseline_seconds=[]), "segmentation", 2)
    assert row["parity"] == "unchecked"
    assert not [name for name in row if "speedup" in name]


def test_other_libraries_are_compared_in_what_they_do() -> None:
    row = rows()[3]
    assert "speedup" not in row
    assert row["backbone_speedup"] == 4.5
    assert row["p50_ms"] == 200.0


def test_rounds_that_the_baseline_missed_do_not_count() -> None:
    row = row_of(measured(baseline_seconds=[PLAIN]), "segmentation", 2)
    assert (row["rounds"], row["speedup"]) == (3, 4.0)


def test_table() -> None:
    lines = {line.split("│")[1].strip(): line for line in text_of(table(rows())).splitlines() if "│" in line}
    cells = [cell.strip() for cell in lines["fast fp32"].split("│")[1:-1]]
    assert cells == [
        "fast fp32", "125", "125 - 125", "4.00x", "50", "50", "15", "10", "100   4.50x", "0.99991", "0.99999",
        "98.75 %", "512 (300 from disk)",
    ]  # fmt: skip
    assert "FAILED" in lines["fast bf16"]
    assert "x" not in lines["fast bf16"]
    assert "FAILED" in lines["fast int8"]
    assert "4.50x" in lines["openvino-fp32"]


def test_remarks() -> None:
    assert remarks(rows(), ["openvino-int8: nncf not installed: pip install 'vpd_fast[openvino]'"]) == [
        "FAILED: fast bf16, 2x3x128x128: a cosine is below 0.999: "
        "{'latents': 0.99999, 'features': [0.99991, 0.99995], 'logits': 0.9}",
        "FAILED: fast int8, 2x3x128x128: not enough memory",
        "left out: openvino-int8: nncf not installed: pip install 'vpd_fast[openvino]'",
    ]


def bars_of(figure) -> list[dict[str, float]]:
    """For each plot of a figure, the length of the bars of a colour in its first row."""
    found = []
    for axis in figure.axes:
        first = [bar for bar in axis.patches if bar.get_y() < 0]
        found.append({to_hex(bar.get_facecolor()): bar.get_width() for bar in first})
    return found


def test_chart_has_a_bar_as_long_as_its_stage(tmp_path) -> None:
    figure = stage_bars(rows(), "a processor")
    (plain,) = bars_of(figure)
    images = 1e3 / CASE.batch
    assert plain == {COLOURS[stage]: pytest.approx(value * images) for stage, value in PLAIN.items()}
    texts = {text.get_text(): to_hex(text.get_color()) for text in figure.axes[0].texts}
    assert texts["FAILED"] == texts["125 FAILED"] == FAILED
    assert texts["500  1.00x"] == "#000000"
    save(figure, tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as picture:
        assert (picture.format, picture.width) == ("PNG", 950)
    other = rows()[0] | {"case": "1x3x64x64"}
    assert len(stage_bars([*rows(), other], "x").axes) == 2


def test_chart_of_failures_only() -> None:
    assert bars_of(stage_bars(rows()[-1:], "x")) == [{}]


def test_without_matplotlib(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it fails
    with pytest.raises(MissingDependencyError, match=r"pictures need matplotlib: pip install 'vpd_fast\[bench\]'"):
        stage_bars(rows(), "x")
