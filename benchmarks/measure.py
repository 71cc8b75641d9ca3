"""Everything worth knowing about a GPU and this engine on it, in one run of at most nine minutes.

    benchmarks/gpu.sh measure                            the same, with the wheel of `gpu.sh pack` if there is one
    python benchmarks/measure.py --out FOLDER
    python benchmarks/measure.py --dry --out FOLDER      tiny sizes on the CPU, to try the program

The most valuable items come first, each has at most its seconds, and every result is printed and written to
FOLDER/measure.json at once, and to FOLDER/measure.txt at the end. A second call goes on where the first one ended.
Items run in one process; one that hangs or breaks the GPU's context costs a single result, and another process goes on.

Exit codes: 0 everything is measured, 1 something failed, 3 some of it is left (call it again), 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from measuring.items import PLAN
from measuring.plan import Plan
from measuring.record import DONE, Record
from measuring.supervisor import Supervisor, Unusable

SECONDS = 520.0
LEFT = 3
INTERRUPTED = 130


def chosen(names: list[str]) -> Plan:
    """The plan with these items only, in their order; all without names."""
    known = [item.name for item in PLAN.items]
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"unknown items {', '.join(unknown)}; known are {', '.join(known)}")
    return Plan(tuple(item for item in PLAN.items if not names or item.name in names), PLAN.setting)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--items", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of the whole run (default {SECONDS:.0f})")
    parser.add_argument("--force", action="store_true", help="measure again what is done")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU; rows name what stood in for a GPU")
    parser.add_argument(
        "--list", action="store_true", help="print the items and what each decides, and measure nothing"
    )
    options = parser.parse_args(arguments)
    plan = chosen(options.items)
    if options.list:
        print("\n".join(f"{item.name:12} {item.seconds:4.0f} s  {item.decides}" for item in plan.items))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    record = Record(options.out, again=options.force)
    supervisor = Supervisor(plan, {"dry": options.dry}, record, options.seconds, options.out / "measure.log")
    try:
        supervisor.run()
    except Unusable as error:
        print(f"measure.py: {error}")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    states = {item.name: record.entry(item)["status"] for item in plan.items}
    print(", ".join(f"{name} {state}" for name, state in states.items()), f"\nwritten to {record.path}")
    if "failed" in states.values():
        return 1
    return 0 if all(state == DONE for state in states.values()) else LEFT


if __name__ == "__main__":
    sys.exit(main())
