"""benchmarks/report.py: the page and the README say what the stored results say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def test_the_page_and_the_readme_are_what_the_script_writes(script) -> None:
    report = script("report")
    assert (ROOT / "docs" / "performance.md").read_text() == report.page()
    readme = (ROOT / "README.md").read_text()
    assert readme == report.readme(readme)


def test_every_stored_result_is_on_the_page(script) -> None:
    page = script("report").page()
    for path in (ROOT / "benchmarks" / "results").rglob("*.json"):
        if path.stem != "regression":
            assert path.relative_to(ROOT).as_posix() in page


@pytest.fixture
def stored(script, tmp_path, monkeypatch) -> Callable[[dict], str]:
    """The page of one made-up file of `vpd-fast bench`."""
    report = script("report")
    content = json.loads((report.MAIN / "bench.json").read_text())

    def page(row: dict) -> str:
        path = tmp_path / "results" / "a-cpu" / "bench.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content | {"rows": [content["rows"][1] | row]}))
        return report.page()

    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    return page


def test_numbers_come_from_the_files(stored) -> None:
    assert "| fast fp32 | 1.23 (" in stored({"p50_ms": 1234.0})
    assert "| 7.77x |" in stored({"speedup": 7.77})
    failed = stored({"parity": "failed", "speedup": 7.77})
    assert "| gate failed |" in failed
    assert "7.77" not in failed


def test_the_chart_is_stored() -> None:
    with Image.open(ROOT / "docs" / "speed.png") as picture:
        assert picture.format == "PNG"
