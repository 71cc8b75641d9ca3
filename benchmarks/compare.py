"""Compares two result files of this folder or of `vpd-fast bench --json`: has a speed-up become smaller?

python benchmarks/compare.py OLD.json NEW.json [--tolerance 0.1]

Ratios of variants that took turns are compared, not times, which depend on what else the machine does. Exits with 1 and
names the first regression: a ratio that is smaller than before by more than the tolerance, or a row that is gone
or has no ratio any more (because it failed its parity gate, for example). Exits with 2 if the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Key = tuple[tuple[str, Any], ...]
TOLERANCE = 0.1  # of a ratio; medians over a few rounds repeat to a few percent
# Whole numbers and words say what was measured, decimal numbers what came out, except for these words and numbers.
FOUND = ("rounds", "error", "parity", "over")


def is_ratio(name: str) -> bool:
    """Whether a value of this name says how many times faster something is."""
    return name == "speedup" or name.endswith("_speedup") or name.startswith("over_")


def ratios(row: Row) -> dict[str, float]:
    """The speed-ups in a row: "speedup", "backbone_speedup", "over_sdpa", ..."""
    return {name: value for name, value in row.items() if is_ratio(name) and isinstance(value, (int, float))}


def key_of(row: Row) -> Key:
    """What tells a row from the others of its file."""
    words = {k: v for k, v in row.items() if k not in FOUND and not is_ratio(k) and isinstance(v, (str, int))}
    return tuple(sorted(words.items()))


def read(path: Path) -> dict[Key, Row]:
    """The rows of a file by what they measured. Raises SystemExit."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        found = {key_of(row): row for row in rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"{path} is no result file: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if len(found) != len(rows):
        print(f"{path} has rows that cannot be told apart", file=sys.stderr)
        raise SystemExit(2)
    return found


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


def main(arguments: list[str] | None = None) -> int:
    """Prints what was found; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"of a ratio (default {TOLERANCE})")
    options = parser.parse_args(arguments)
    old, new = read(options.old), read(options.new)
    found = regressions(old, new, options.tolerance)
    if found:
        print(f"regression: {found[0]}" + (f" (and {len(found) - 1} more)" if len(found) > 1 else ""))
        return 1
    print(f"no regression: {sum(len(ratios(row)) for row in old.values())} ratios within {options.tolerance:.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
