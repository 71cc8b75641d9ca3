"""What is known so far: a JSON file that every finished step is written into at once, and a page to read."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import planned

from measuring.plan import Item, Row
from vpd_fast.bench.timing import table
from vpd_fast.files import write_files

MAX_BYTES = 2_000_000  # of either file
MAX_TEXT = 1000  # characters of a single value
SECONDS_BETWEEN_WRITES = 1.0
DONE = "done"
PRECISIONS, BATCH = ("int8", "bf16"), 8  # that steps are planned for


def short(value: Any) -> Any:
    """The value, with as many digits as mean something and no endless text."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, str):
        return value if len(value) <= MAX_TEXT else value[:MAX_TEXT] + "..."
    if isinstance(value, dict):
        return {str(key): short(item) for key, item in value.items()}
    return [short(item) for item in value] if isinstance(value, list | tuple) else value


class Record:
    """Results by item and step, read from `folder`/measure.json if it is there.

    again: begin anew whatever is there. Results of another device or other software are kept beside it, as
    measure.json.old, as soon as `set_facts` finds out.
    """

    def __init__(self, folder: Path, again: bool = False) -> None:
        self.path, self.page_path = folder / "measure.json", folder / "measure.txt"
        self.facts: dict[str, Any] = {}
        self.items: dict[str, dict[str, Any]] = {}
        self._size, self._left_out, self._written = 0, 0, 0.0
        if self.path.is_file() and not again:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            self.facts, self.items = content["facts"], content["items"]
            self._size = self.path.stat().st_size

    def set_facts(self, facts: dict[str, Any]) -> bool:
        """Take what results depend on. Returns whether there were results of something else, which are set aside."""
        facts = json.loads(json.dumps(facts))
        other = bool(self.items) and {**self.facts, "time": None} != {**facts, "time": None}
        if other:
            self.path.replace(self.path.with_name("measure.json.old"))
            self.items, self._size = {}, 0
        self.facts = facts
        return other

    def entry(self, item: Item) -> dict[str, Any]:
        """Everything about an item, to be filled."""
        new = {"status": "left", "seconds": 0.0, "decides": item.decides, "steps": {}}
        return self.items.setdefault(item.name, new)

    def is_done(self, item: Item) -> bool:
        """Return whether nothing of an item is left to do."""
        return self.items.get(item.name, {}).get("status") == DONE

    def done_steps(self, item: Item) -> list[str]:
        """Names of the steps that need not be repeated."""
        return [name for name, step in self.entry(item)["steps"].items() if step["status"] == DONE]

    def add(self, item: Item, name: str, status: str, **content: Any) -> None:
        """Keep what came of a step; rows that would make the file too large are counted only."""
        step = {"status": status, **short(content)}
        size = len(json.dumps(step))
        if self._size + size > MAX_BYTES * 0.9:
            self._left_out += len(step.pop("rows", []))
        else:
            self._size += size
        self.entry(item)["steps"][name] = step
        if time.monotonic() - self._written > SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        """Write the JSON file."""
        content = {"facts": self.facts, "items": self.items, "rows_left_out": self._left_out}
        text = json.dumps(content, indent=None, separators=(",", ":")).replace('"steps":{', '\n"steps":{') + "\n"
        write_files({self.path: lambda path: path.write_text(text, encoding="utf-8")})
        self._written = time.monotonic()

    def rows(self, item: str) -> list[Row]:
        """All rows of an item, with the names of their steps."""
        steps = self.items.get(item, {}).get("steps", {})
        return [{"step": name, **row} for name, step in steps.items() for row in step.get("rows", [])]

    def write_page(self, items: Iterable[Item]) -> str:
        """Write the page and return it."""
        parts = [", ".join(f"{key} {value}" for key, value in self.facts.items() if value is not None)]
        parts += [self._section(item) for item in items if item.name in self.items]
        parts += [self._predicted(precision) for precision in PRECISIONS if not self.facts.get("dry")]
        page = "\n\n".join(parts) + "\n"
        if len(page) > MAX_BYTES:
            page = page[: MAX_BYTES - 100] + "\n... the rest is in measure.json\n"
        write_files({self.page_path: lambda path: path.write_text(page, encoding="utf-8")})
        return page

    def _predicted(self, precision: str) -> str:
        """Planned steps beside the fastest pass at the batch that they are predicted for."""
        passes = [row for row in self.rows("passes") if (row.get("precision"), row.get("batch")) == (precision, BATCH)]
        best = min((row["ms_per_image"] for row in passes if "ms_per_image" in row), default=None)
        tables = planned.steps(precision, BATCH, best), planned.left_out(precision, BATCH)
        return "\n".join([f"== planned, {precision}, ms per image at batch {BATCH}", *map(table, tables)])

    def _section(self, item: Item) -> str:
        entry = self.items[item.name]
        lines = [f"== {item.name} ({entry['status']}, {entry['seconds']:.0f} of {item.seconds:.0f} s): {item.decides}"]
        tables: dict[tuple[str, ...], list[Row]] = {}
        for name, step in entry["steps"].items():
            conditions = {key: step["gpu"][key] for key in ("sm_mhz", "watts") if step.get("gpu", {}).get(key)}
            for row in step.get("rows", []):
                row = {"step": name, **row, **conditions}
                tables.setdefault(tuple(row), []).append(row)
        lines += [table(rows) for rows in tables.values()]
        lines += [
            f"{step['status'].upper()} {name}: {step.get('error', '')}"
            for name, step in entry["steps"].items()
            if step["status"] != DONE
        ]
        return "\n".join(lines)
