"""Where the time of a fast model goes, layer by layer, and how far each kind of layer is from this device's peak.

    python benchmarks/layers.py --precision bf16 int8 --size 512
    python benchmarks/layers.py --device cuda --precision bf16 int8 --batch 1 8

Full size, random weights. "gflop_per_s" counts what a layer computes by definition; "of_peak" counts the products that
are made, fewer with Winograd's algorithm, against a large matrix product of oneDNN or cuBLASLt in the same precision.

On a CPU layers are timed while a pass runs. On a GPU each is timed alone, with the inputs that it has in a pass, as the
replay of a CUDA graph: with a cold L2 cache ("ms", as if nothing came from the layer before) and with a warm one
("warm_ms"). The rest is what the whole pass, replayed as one graph, takes beyond the sum of "ms"; it is negative if
layers find more in the cache. `roofline.py --device FILE` compares the file with what would be possible.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import vpd_fast
from vpd_fast import VPD, VPDConfig
from vpd_fast.bench import peaks
from vpd_fast.bench.catalog import why_unusable
from vpd_fast.bench.engine_pass import MODELS, Label, LabelledPass, labelled
from vpd_fast.bench.environment import device_name
from vpd_fast.bench.operations import Operation, ValuesAreFine, empty_engine, trace
from vpd_fast.bench.parity import make_images
from vpd_fast.bench.statistics import percentile
from vpd_fast.bench.timing import measure, table, write_rows
from vpd_fast.engine.policy import PRECISIONS
from vpd_fast.errors import InputError
from vpd_fast.models.random_weights import randomize

Key = tuple[str, str]  # stage and part
REST: Key = ("all", "rest")


@dataclass
class Times:
    """Seconds of the calls of one part in one pass: cold, and on a GPU also with a warm cache."""

    label: Label
    calls: int = 0
    seconds: float = 0.0
    warm: float | None = None


@dataclass
class Pass:
    """Times of one pass by part, and of what is around them."""

    parts: dict[Key, Times] = field(default_factory=dict)
    rest: float = 0.0

    def add(self, label: Label, seconds: float, warm: float | None = None) -> None:
        """The time of one call."""
        part = self.parts.setdefault((label.stage, label.part), Times(label))
        part.calls, part.seconds = part.calls + 1, part.seconds + seconds
        part.warm = warm if part.warm is None or warm is None else part.warm + warm


def timed_on_cpu(run: LabelledPass, images: torch.Tensor) -> Pass:
    """One pass with labels, its operations timed while it runs."""
    found = Pass()

    def around(label: Label, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        found.add(label, time.perf_counter() - start)
        return result

    start = time.perf_counter()
    run(images, around)
    found.rest = time.perf_counter() - start - sum(part.seconds for part in found.parts.values())
    return found


def timed_on_gpu(run: LabelledPass, images: torch.Tensor, rounds: int) -> Pass:
    """Medians of every operation alone, with the inputs of a pass, and of the whole pass."""
    found = Pass()

    def median(call: Callable[[], Any], cold: bool) -> float:
        return percentile(measure({"": call}, "cuda", rounds=rounds, cold=cold)[""], 50)

    def around(label: Label, call: Callable[[], Any]) -> Any:
        found.add(label, median(call, cold=True), median(call, cold=False))
        return call()

    run.model.graphs = False  # one graph for each operation, made here
    run(images, around)
    with ValuesAreFine():
        whole = median(lambda: run(images), cold=True)
    found.rest = whole - sum(part.seconds for part in found.parts.values())
    return found


def counted(model: VPDConfig, precision: str, kind: str, images: torch.Tensor) -> dict[Key, list[Operation]]:
    """Operations of a pass by part, with their products."""
    found: dict[Key, list[Operation]] = defaultdict(list)
    for operation in trace(empty_engine(model, precision, kind), images.to("meta")):
        found[operation.label.stage, operation.label.part].append(operation)
    return found


def summary(
    passes: list[Pass], counts: dict[Key, list[Operation]], peak: dict[str, float], facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """The median pass of each part, the longest first."""
    medians = {key: percentile([p.parts[key].seconds for p in passes], 50) for key in passes[0].parts}
    medians[REST] = percentile([p.rest for p in passes], 50)
    total = sum(medians.values())
    rows = []
    for key, median in medians.items():
        part = passes[0].parts.get(key)
        row = {**facts, "stage": key[0], "part": key[1], "in": part.label.precision if part else ""}
        row |= {"calls": part.calls if part else 1, "ms": round(median * 1e3, 4), "share": round(median / total, 4)}
        if part and part.warm is not None:
            row["warm_ms"] = round(percentile([p.parts[key].warm for p in passes], 50) * 1e3, 4)
        gflop, made = (sum(getattr(o, name) for o in counts[key]) for name in ("gflop", "made"))
        if part and gflop:
            row |= {"gflop": round(gflop, 2), "gflop_per_s": round(gflop / median, 1)}
            if part.label.precision in peak:
                row["of_peak"] = round(made / median / peak[part.label.precision], 3)
        rows.append(row)
    return sorted(rows, key=lambda row: -row["ms"])


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--size", type=int, nargs="+", default=[512])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=20, help="to print, of each precision, size and batch")
    parser.add_argument("--model", choices=list(MODELS), default="full", help="small: a fifth as wide, for a quick try")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch finds no NVIDIA GPU here")
    config, rows = MODELS[args.model], []
    peak = peaks.measured(args.device, [p for p in PRECISIONS if why_unusable(p, args.device) is None])
    print("GFLOP/s of a large matrix product:", ", ".join(f"{name} {rate:.0f}" for name, rate in peak.items()))
    plain = functools.cache(lambda: randomize(VPD.empty(config), seed=0, device=args.device).eval())
    for precision in args.precision:
        try:
            model = vpd_fast.optimize(plain(), precision)
        except InputError as error:
            print(f"left out: {precision}: {error}")
            continue
        with labelled(model) as run:
            for size, batch in ((size, batch) for size in args.size for batch in args.batch):
                images = make_images(batch, size).to(args.device)
                facts = {"precision": precision, "size": size, "threads": torch.get_num_threads()}
                facts |= {"batch": batch} if batch != 1 else {}
                facts |= {"model": args.model} if args.model != "full" else {}
                with torch.inference_mode():
                    run(images)  # warm up
                    if args.device == "cpu":
                        passes = [timed_on_cpu(run, images) for _ in range(args.rounds)]
                    else:
                        passes = [timed_on_gpu(run, images, args.rounds)]
                found = summary(passes, counted(config, precision, args.device, images), peak, facts)
                print(f"\n{precision}, {batch}x3x{size}x{size}: {sum(row['ms'] for row in found):.3f} ms")
                print(table([{k: v for k, v in row.items() if k not in facts} for row in found[: args.rows]]))
                rows += found  # what is measured is kept if the next one is interrupted
                path = write_rows("layers", args.device, rows, kind=args.device, peak_gflop_per_s=peak)
                print(f"{device_name(args.device)}: written to {path}")


if __name__ == "__main__":
    main()
