"""Predicted gains of planned steps (planned_steps.json), beside what is measured, and of steps that are left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("planned_steps.json")


def _content() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def steps(precision: str, batch: int, measured: float | None) -> list[dict[str, Any]]:
    """A row for each planned step: predicted ms per image and gain, and whether the measured ms per image are there.

    Empty for a precision or a batch that nothing is predicted for.
    """
    content = _content()
    rows: list[dict[str, Any]] = []
    for step in content["steps"] if batch == content["batch"] else ():
        if precision not in step:
            continue
        gain = rows[-1]["predicted_ms"] - step[precision] if rows else 0.0
        row = {"step": step["step"], "predicted_ms": step[precision], "gain_ms": round(gain, 2)}
        if measured is not None:
            row |= {"measured_ms": round(measured, 3), "reached": "yes" if measured <= step[precision] else "no"}
        rows.append(row)
    return rows


def left_out(precision: str, batch: int) -> list[dict[str, Any]]:
    """A row for each step that is not planned because too little is predicted: its gain in ms per image, and why.

    Empty for a precision or a batch that nothing is predicted for.
    """
    content = _content()
    return [
        {"left out": step["step"], "gain_ms": step[precision], "why": step["why"]}
        for step in (content["left_out"] if batch == content["batch"] else ())
        if precision in step
    ]
