"""How fast a fast model could be at most: every operation of a pass, its products, its bytes, and its least time.

    python benchmarks/roofline.py --device h200 --precision bf16 int8 --png roofline.png
    python benchmarks/roofline.py --device benchmarks/results/amd-epyc-avx512-bf16/layers.json

An operation takes at least its products over the device's rate of products, its operands (each read or written once)
over the bandwidth, and the exponentials of attention over their rate, whichever is longest ("floor"). The operations
come from the engine's own code (`operations.py`). With a file of `layers.py` as device, its measured rates are taken,
and what it measured for the same size, batch and task is printed beside; "gap" is measured over floor. Where steps are
planned and their gains predicted (planned_steps.json), those are printed, too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import planned
import torch

from vpd_fast import VPDConfig
from vpd_fast.bench import plots
from vpd_fast.bench.engine_pass import STAGES
from vpd_fast.bench.environment import environment
from vpd_fast.bench.operations import GLUE, Operation, empty_engine, trace
from vpd_fast.bench.peaks import DEVICES, Device, find
from vpd_fast.bench.timing import table
from vpd_fast.config import SIZE_MULTIPLE
from vpd_fast.engine.policy import PRECISIONS
from vpd_fast.files import write_files

Row = dict[str, Any]
REST = ("all", "rest")  # stage and part of what layers.py measured between the layers
GROUPS = ("stage", "kind", "side")


@dataclass(frozen=True)
class Case:
    """What is computed."""

    task: str
    precision: str
    size: int
    batch: int

    def __str__(self) -> str:
        return f"{self.task}, {self.precision}, {self.batch}x3x{self.size}x{self.size}"

    def operations(self, kind: str) -> list[Operation]:
        """Operations of the engine for a kind of device, full size."""
        model = empty_engine(VPDConfig(task=self.task), self.precision, kind)
        return trace(model, torch.empty(self.batch, 3, self.size, self.size, device="meta"))

    def measured(self, content: dict[str, Any]) -> dict[tuple[str, str], float]:
        """{(stage, part): milliseconds} in a file of layers.py, of this case."""
        wanted = {"precision": self.precision, "size": self.size, "batch": self.batch, "task": self.task}
        wanted |= {"model": "full"}
        known = {"batch": 1, "task": "segmentation", "model": "full"}  # of rows that do not say
        rows = [row for row in content["rows"] if all((known | row).get(k) == v for k, v in wanted.items())]
        return {(row["stage"], row["part"]): row["ms"] for row in rows}


def operation_rows(operations: Iterable[Operation], device: Device) -> list[Row]:
    """One row per operation."""
    rows = []
    for operation in operations:
        label, (floor, bound) = operation.label, operation.floor(device)
        row = {"stage": label.stage, "part": label.part, "kind": label.kind, "name": label.name, "side": label.side}
        row |= {"in": label.precision, "calls": 1, "gflop": operation.gflop, "made_gflop": operation.made}
        row |= {"weights_mb": operation.weights, "activations_mb": operation.read + operation.written}
        rows.append(row | {"floor_ms": floor, "bound": bound})
    return rows


def grouped(rows: Iterable[Row], *keys: str) -> list[Row]:
    """Rows with the same values of `keys` added up, the longest floor first; "bound" is what most of its floor is."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    found = []
    for values, members in groups.items():
        total = dict(zip(keys, values, strict=True))
        for name in ("calls", "gflop", "made_gflop", "weights_mb", "activations_mb", "floor_ms"):
            total[name] = sum(row[name] for row in members)
        megabytes = total["weights_mb"] + total["activations_mb"]
        total["flop_per_byte"] = total["made_gflop"] * 1e3 / megabytes if megabytes else 0.0
        floors: dict[str, float] = {}
        for row in members:
            floors[row["bound"]] = floors.get(row["bound"], 0.0) + row["floor_ms"]
        total["bound"] = max(floors, key=floors.__getitem__)
        if any("ms" in row for row in members):  # a group with a part that was not measured has no gap
            total["ms"] = sum(row.get("ms", 0.0) for row in members)
            if all("ms" in row for row in members) and total["floor_ms"]:
                total["gap"] = total["ms"] / total["floor_ms"]
        found.append(total)
    return sorted(found, key=lambda row: -row["floor_ms"])


def parts_of(rows: list[Row], measured: dict[tuple[str, str], float]) -> list[Row]:
    """One row per part of a stage, with what was measured; parts that were not measured alone are in the rest."""
    parts = grouped(rows, "stage", "part")
    for part in parts:  # a few layers of the heads share a name, but not everything else
        own = (row for row in rows if (row["stage"], row["part"]) == (part["stage"], part["part"]))
        largest = max(own, key=lambda row: row["floor_ms"])
        part |= {key: largest[key] for key in ("kind", "side", "in")}
    if not measured:
        return parts
    rest, found = [], []
    for row in parts:
        key = row["stage"], row["part"]
        if key not in measured:
            rest.append(row | {"stage": REST[0], "part": REST[1]})
        else:
            found.append(row | {"ms": measured[key], "gap": measured[key] / row["floor_ms"]})
    known = {(row["stage"], row["part"]) for row in found}
    left = sum(ms for key, ms in measured.items() if key not in known)  # REST, and what this engine does not have
    for row in grouped(rest, "stage", "part"):
        found.append(row | {"kind": GLUE, "side": 0, "in": "", "ms": left, "gap": left / row["floor_ms"]})
    return found


def rounded(row: Row) -> Row:
    """The row with as many digits as mean something."""
    digits = {"floor_ms": 4, "gap": 2, "ms": 3, "flop_per_byte": 1}
    return {k: round(v, digits.get(k, 3)) if isinstance(v, float) else v for k, v in row.items()}


def analyse(case: Case, device: Device, content: dict[str, Any] | None) -> dict[str, Any]:
    """Operations, parts and totals of a case; content: of the file of layers.py, if there is one."""
    rows = operation_rows(case.operations(device.kind), device)
    measured = case.measured(content) if content else {}
    if content and not measured:
        print(f"{case}: not measured in that file")
    parts = parts_of(rows, measured)
    totals = {key: grouped(parts, key) for key in GROUPS}
    (total,) = grouped([part | {"all": "all"} for part in parts], "all")
    named = {"task": case.task, "precision": case.precision, "size": case.size, "batch": case.batch}
    return named | {"operations": rows, "parts": parts, "totals": totals, "total": total}


def show(result: dict[str, Any], case: Case, most: int) -> None:
    """Prints the tables of a case."""
    total = result["total"]
    print(f"\n{case}: {total['made_gflop']:.1f} GFLOP, {total['weights_mb']:.0f} MB of weights, "
          f"{total['activations_mb']:.0f} MB of activations; at least {total['floor_ms']:.3f} ms"
          + (f", measured {total['ms']:.3f} ms" if "ms" in total else ""))  # fmt: skip
    order = {name: i for i, name in enumerate((*STAGES, REST[0]))}
    for key in GROUPS:
        rows = result["totals"][key]
        if key == "stage":
            rows = sorted(rows, key=lambda row: order[row["stage"]])
        print(f"\nby {key}{' of the result (0: none)' if key == 'side' else ''}")
        print(table([rounded(row) for row in rows]))
    print(f"\nthe largest {most} of {len(result['parts'])} parts")
    print(table([rounded(row) for row in result["parts"][:most]]))
    if (case.size, case.task) == (512, "segmentation"):
        measured = total["ms"] / case.batch if "ms" in total else None
        steps = planned.steps(case.precision, case.batch, measured)
        left_out = planned.left_out(case.precision, case.batch)
        print(f"\nplanned, ms per image\n{table(steps)}\n{table(left_out)}" if steps else "", end="\n" if steps else "")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(DEVICES)
    parser.add_argument("--device", default="h200", help=f"{known}, or a file of layers.py (default h200)")
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS), help="default: those in the file, or bf16")
    parser.add_argument("--task", choices=["segmentation", "referring", "depth"], default="segmentation")
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels, a multiple of 64")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rows", type=int, default=20, help="parts to print")
    parser.add_argument("--json", type=Path, help="write everything to this file, every single operation too")
    parser.add_argument("--png", type=Path, help="draw the chart into this file")
    options = parser.parse_args(arguments)
    if options.size < SIZE_MULTIPLE or options.size % SIZE_MULTIPLE or options.batch < 1:
        sys.exit(f"--size must be a multiple of {SIZE_MULTIPLE} and --batch at least 1")
    device = find(options.device)
    content = None if options.device in DEVICES else json.loads(Path(options.device).read_text(encoding="utf-8"))
    found = [p for p in PRECISIONS if content and any(row.get("precision") == p for row in content["rows"])]
    rates = ", ".join(f"{name} {rate / 1e3:.4g}" for name, rate in device.gflop_per_s.items())
    print(f"{device.name}: TFLOP/s {rates}; {device.gb_per_s:.0f} GB/s; {device.source}")
    results = []
    for precision in options.precision or found or ["bf16"]:
        case = Case(options.task, precision, options.size, options.batch)
        results.append(analyse(case, device, content))
        show(results[-1], case, options.rows)
    writers = {}
    if options.json:
        named = [{key: r[key] for key in ("task", "precision", "size", "batch")} for r in results]
        rows = [known | part for known, r in zip(named, results, strict=True) for part in r["parts"]]
        facts = {"device": vars(device), "environment": environment("cpu"), "rows": rows, "results": results}
        writers[options.json] = lambda path: Path(path).write_text(json.dumps(facts, indent=1) + "\n")
    if options.png:
        groups = [grouped(result["parts"], "stage", "kind", "side", "in") for result in results]
        figure = plots.roofline(results, groups, device)
        writers[options.png] = lambda path: plots.save(figure, path)
    if writers:
        write_files(writers)
        print("\nwritten to", ", ".join(map(str, writers)))


if __name__ == "__main__":
    main()
