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

from vpd_fast.bench.regression import Key, Row, key_of, ratios, regressions

TOLERANCE = 0.1  # of a ratio; medians over a few rounds repeat to a few percent


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
