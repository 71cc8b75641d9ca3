"""What an evaluation found, and its files: metrics, tables, and the worst cases to look at."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vpd_fast.errors import InputError
from vpd_fast.evaluation.gallery import Case, page, sheet
from vpd_fast.evaluation.metrics import PRIMARY
from vpd_fast.files import json_text, write_files, write_text
from vpd_fast.tasks import TASKS

UNITS = {"rmse": " m", "sq_rel": " m", "abs_rel": "", "rmse_log": "", "log10": "", "silog": ""}


@dataclass
class Evaluation:
    """The result of `evaluate`.

    metrics: name -> value, shares as fractions between 0 and 1; see vpd_fast.evaluation.metrics.
    per_class: a row per class, empty but for segmentation. per_image: a row per image (referring: per sentence), sorted
    by index.
    count: images measured. failed: {"index", "name", "error"} of samples that could not be read or measured. left_out:
    {"index", "name"} of images without a single labelled pixel, which count nowhere.
    settings: how was predicted and measured. notes: what whoever reads the numbers must know.
    seconds: from the first sample to the last, of the slowest process.
    worst: the worst cases, worst first.
    """

    task: str
    metrics: dict[str, float]
    per_class: list[dict[str, Any]]
    per_image: list[dict[str, Any]]
    count: int
    failed: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    worst: list[Case] = field(default_factory=list, repr=False)

    @property
    def primary(self) -> tuple[str, float]:
        """The name and value of the metric that decides which model is the better one."""
        name = PRIMARY[self.task][0]
        return name, self.metrics[name]

    def summary(self) -> dict[str, Any]:
        """Return what metrics.json holds, plain containers only."""
        return {
            "task": self.task, "metrics": self.metrics, "count": self.count, "rows": len(self.per_image),
            "seconds": round(self.seconds, 3), "settings": self.settings, "notes": self.notes, "failed": self.failed,
            "left_out": self.left_out,
        }  # fmt: skip

    def save(self, folder: str | Path, header: Mapping[str, Any] | None = None) -> list[Path]:
        """Write metrics.json, per_image.csv, per_class.csv (segmentation), worst.html and worst.png; all or none.

        header: what else metrics.json says, before the results: model, data set. Raises InputError if the folder
        cannot be written.
        """
        folder = Path(folder)
        text = json_text({**(header or {}), **self.summary()})
        writers: dict[Path, Callable[[Path], object]] = {
            folder / "metrics.json": lambda path: path.write_text(text, encoding="utf-8"),
            folder / "per_image.csv": lambda path: _write_csv(path, self.per_image),
        }
        if self.per_class:
            writers[folder / "per_class.csv"] = lambda path: _write_csv(path, self.per_class)
        if self.worst:
            metrics = ", ".join(f"{name} {show(name, value)}" for name, value in list(self.metrics.items())[:9])
            titles = (
                f"The worst {len(self.worst)} of {len(self.per_image)} {TASKS[self.task].rows}",
                f"{self.task}, {self.count} image{'' if self.count == 1 else 's'}: {metrics}",
            )
            writers[folder / "worst.html"] = lambda path: write_text(path, page(self.worst, *titles))
            writers[folder / "worst.png"] = lambda path: sheet(self.worst, *titles).save(path, format="PNG")
        try:
            write_files(writers)
        except OSError as error:
            raise InputError(f"{folder}: cannot write the evaluation there ({error.strerror or error})") from error
        return list(writers)


def show(name: str, value: float | None) -> str:
    """Format a metric as people read it: shares in percent, errors with their unit."""
    if value is None:
        return ""
    return f"{value:.4f}{UNITS[name]}" if name in UNITS else f"{100 * value:.2f} %"


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        if rows:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
