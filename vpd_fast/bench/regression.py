"""Whether something has become slower: speed-ups of one run against those that were stored.

Times depend on what else a machine does; ratios of variants that took turns do not, up to some noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vpd_fast.bench.environment import environment
from vpd_fast.files import write_files, write_json

Row = dict[str, Any]
Key = tuple[tuple[str, Any], ...]
# Ratios of short calls on two shared cores repeat to 10 %, in bad runs to 20 %.
NOISE = 0.25
# Whole numbers and words say what was measured, decimal numbers what came out, except for these words and numbers.
RESULTS = ("rounds", "error", "parity", "over")
TIME = "p50_ms"  # the median
# First words of the variants that are not ours, among them what the others are compared with.
PEERS = ("eager", "sdpa", "compiled", "onednn", "cublas", "cudnn", "pytorch", "reference", "plain")


def is_ratio(name: str) -> bool:
    """Whether a value of this name says how many times faster something is."""
    return name == "speedup" or name.endswith("_speedup") or name.startswith("over_")


def ratios(row: Row) -> dict[str, float]:
    """The speed-ups in a row: "speedup", "backbone_speedup", "over_sdpa", ..."""
    return {name: value for name, value in row.items() if is_ratio(name) and isinstance(value, (int, float))}


def words(row: Row) -> Row:
    """What a row is about: its words and whole numbers."""
    return {k: v for k, v in row.items() if k not in RESULTS and not is_ratio(k) and isinstance(v, (str, int))}


def key_of(row: Row) -> Key:
    """What tells a row from the others of its file."""
    return tuple(sorted(words(row).items()))


def regressions(old: dict[Key, Row], new: dict[Key, Row], tolerance: float) -> list[str]:
    """One line per ratio that became smaller by more than `tolerance` of it, or is gone; in the order of `old`."""
    lines = []
    for key, before in old.items():
        name = ", ".join(str(value) for _, value in key)
        if not ratios(before):
            continue
        if key not in new:
            lines.append(f"{name}: not measured any more")
            continue
        after = ratios(new[key])
        for ratio, value in ratios(before).items():
            if ratio not in after:
                reason = new[key].get("error") or f"parity {new[key].get('parity', 'unknown')}"
                lines.append(f"{name}: {ratio} was {value}, now there is none ({reason})")
            elif after[ratio] < value * (1 - tolerance):
                lines.append(f"{name}: {ratio} was {value}, now {after[ratio]}")
    return lines


def gated(suite: str, rows: Iterable[Row]) -> list[Row]:
    """The rows of our own variants, reduced to what they are about, their ratios and their median time."""
    ours = [row for row in rows if str(row["variant"]).split()[0] not in PEERS and row["variant"] != row.get("over")]
    kept = [(row, {name: row[name] for name in (TIME,) if name in row}) for row in ours if ratios(row)]
    return [{"suite": suite} | words(row) | ratios(row) | time for row, time in kept]


class StoredRatios:
    """The file FOLDER/<kind of machine>/regression.json."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.path = folder / kind / "regression.json"

    def store(self, rows: list[Row], device: str) -> None:
        """Write the rows of `gated` in place of those stored before."""
        content = {"environment": environment(device), "noise": NOISE, "rows": rows}
        write_files({self.path: lambda path: write_json(path, content)})

    def slower(self, rows: Iterable[Row]) -> tuple[list[str], int]:
        """One line for each of these rows that is slower than stored, and how many were compared.

        A kernel that is slower has lost against everything beside it. So a row with several ratios, to eager PyTorch
        and to SDPA for example, is slower if each of them fell below what is stored by more than NOISE, and if its own
        time rose as much, where both are known: libraries choose other kernels from day to day, and then only they
        differ.
        """
        stored = {key_of(row): row for row in json.loads(self.path.read_text(encoding="utf-8"))["rows"]}
        lines, compared = [], 0
        for row in rows:
            then = stored.get(key_of(row), {})
            before, now = ratios(then), ratios(row)
            common = sorted(before.keys() & now.keys())
            compared += bool(common)
            longer = row.get(TIME, math.inf) * (1 - NOISE) > then.get(TIME, 0)
            if common and longer and all(now[name] < before[name] * (1 - NOISE) for name in common):
                name = ", ".join(str(value) for value in words(row).values())
                lines.append(f"{name}: " + ", ".join(f"{r} was {before[r]}, now {now[r]}" for r in reversed(common)))
        return lines, compared
