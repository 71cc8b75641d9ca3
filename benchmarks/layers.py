"""Where the time of a fast model goes, layer by layer, and how far each kind of layer is from this CPU's peak.

    python benchmarks/layers.py --precision bf16 int8 --size 512

Full size, random weights. "gflop_per_s" counts what a layer computes by definition; "of_peak" counts the products that
are made, fewer with Winograd's algorithm, against a large matrix product of oneDNN in the same precision.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import onednn
import torch
from timing import matmul_gflop_per_s, measure, percentile, table, write_rows

import vpd_fast
from vpd_fast import VPD, VPDConfig, ops
from vpd_fast.benchmark.parity import make_images
from vpd_fast.engine.model import FastVPD
from vpd_fast.models.random_weights import randomize

NAMES = {"conv1": "3x3", "conv2": "3x3"}  # of layers whose last name says little
MADE = {16: 4 / 9, 36: 1 / 4, 9: 1 / 4}  # products that Winograd's algorithm makes, of those of a direct convolution


@dataclass
class Part:
    """What the layers of one kind and size took in one pass."""

    precision: str
    calls: int = 0
    seconds: float = 0.0
    flop: float = 0.0
    made: float = 0.0


Parts = dict[tuple[str, str], Part]  # by stage and description


class Timed:
    """A layer, or a function of `vpd_fast.ops`, whose calls are counted in the parts."""

    def __init__(self, inner: Any, note: Callable[..., None]) -> None:
        self._inner, self._note = inner, note

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = self._inner(*args, **options)
        self._note(time.perf_counter() - start, result, *args, **options)
        return result


def describe(name: str, layer: Any, side: int) -> str:
    """What a layer is, and the height of its output: layers of the same description are one part."""
    kind = name.rpartition(".")[2]
    if layer.kind == "group_norm":
        return f"group norm at {side}"
    if layer.kind == "conv2d" and layer.stride == 2:
        return f"3x3 of stride 2 to {side}"
    if layer.kind == "winograd_conv2d":
        return f"3x3 {'enlarging to' if layer.upsample else 'at'} {side}"
    return f"{NAMES.get(kind, kind)} at {side}"


def timed_pass(model: FastVPD, images: torch.Tensor) -> Parts:
    """One pass with labels; what is around the layers is the part "rest"."""
    parts: Parts = {}
    precisions = {info.name: info.precision for info in model.infos}

    def add(key: tuple[str, str], precision: str, seconds: float, flop: float = 0.0, made: float = 1.0) -> None:
        part = parts.setdefault(key, Part(precision))
        part.calls, part.seconds = part.calls + 1, part.seconds + seconds
        part.flop, part.made = part.flop + flop, part.made + flop * made

    def of_layer(name: str, layer: Any) -> Callable[..., None]:
        def note(seconds: float, result: torch.Tensor, x: torch.Tensor, *_: Any, **__: Any) -> None:
            stage = name.partition(".")[0]
            if layer.kind == "group_norm":
                add((stage, describe(name, layer, x.shape[1])), "fp32", seconds)
                return
            rows, made, k = result.numel() // result.shape[-1], 1.0, layer.weight.k
            if layer.kind == "winograd_conv2d":
                k, made = 9 * k, MADE[layer.weight.taps]
            side = result.shape[1] if result.dim() == 4 else math.isqrt(result.shape[1])
            add((stage, describe(name, layer, side)), precisions[name], seconds, 2.0 * rows * k * layer.weight.n, made)

        return note

    def attention(seconds: float, result: Any, q: torch.Tensor, k: torch.Tensor, *_: Any, **__: Any) -> None:
        own = "self" if q.shape[1] == k.shape[1] else "cross"
        stage = "unet" if q.shape[2] != model.layers["encoder.mid.attn.before"].weight.k else "encoder"
        flop = 4.0 * q.numel() * k.shape[1]
        add((stage, f"{own}-attention at {math.isqrt(q.shape[1])}"), "bf16" if q.dtype == torch.bfloat16 else "fp32",
            seconds, flop)  # fmt: skip

    def post(seconds: float, *_: Any, **__: Any) -> None:
        add(("post", "upsample_argmax"), "fp32", seconds)

    layers = {name: Timed(layer, of_layer(name, layer)) for name, layer in model.layers.items()}
    functions = {"self_attention": attention, "cross_attention_maps_into": attention, "upsample_argmax": post}
    with ExitStack() as stack, torch.inference_mode():
        stack.enter_context(mock.patch.dict(model.layers, layers))
        for name, note in functions.items():
            stack.enter_context(mock.patch.object(ops, name, Timed(getattr(ops, name), note)))
        start = time.perf_counter()
        features = model.features(model.encode(images), model.context(len(images)))
        ops.upsample_argmax(model.decode(features), images.shape[2:])
        rest = time.perf_counter() - start - sum(part.seconds for part in parts.values())
    add(("all", "rest"), "", rest)
    return parts


def peaks() -> dict[str, float]:
    """GFLOP/s of large matrix products."""
    side = 1536
    product = onednn.linear(side, torch.randn(side, side), torch.zeros(side), "int8")
    seconds = percentile(measure({"int8": product}, rounds=10)["int8"], 20)
    return {
        "fp32": matmul_gflop_per_s("cpu", torch.float32),
        "bf16": matmul_gflop_per_s("cpu", torch.bfloat16),
        "int8": 2 * side**3 / seconds / 1e9,
    }


def summary(passes: list[Parts], peak: dict[str, float], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The median pass of each part, the longest first."""
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for parts in passes:
        for key, part in parts.items():
            seconds[key].append(part.seconds)
    total = sum(percentile(values, 50) for values in seconds.values())
    rows = []
    for key, part in passes[0].items():
        median = percentile(seconds[key], 50)
        row = {**facts, "stage": key[0], "part": key[1], "in": part.precision, "calls": part.calls}
        row |= {"ms": round(median * 1e3, 2), "share": round(median / total, 4)}
        if part.flop:
            rate = part.flop / median / 1e9
            row |= {"gflop": round(part.flop / 1e9, 2), "gflop_per_s": round(rate, 1)}
            row["of_peak"] = round(rate * part.made / part.flop / peak[part.precision], 3)
        rows.append(row)
    return sorted(rows, key=lambda row: -row["ms"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16", "int8"], choices=["fp32", "bf16", "int8"])
    parser.add_argument("--size", type=int, nargs="+", default=[512])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=20, help="to print, of each precision and size")
    args = parser.parse_args()
    peak, rows = peaks(), []
    print("GFLOP/s of a large matrix product:", ", ".join(f"{name} {rate:.0f}" for name, rate in peak.items()))
    for precision in args.precision:
        model = vpd_fast.optimize(randomize(VPD.empty(VPDConfig()), seed=0).eval(), precision)
        for size in args.size:
            images = make_images(1, size)
            timed_pass(model, images)  # warm up
            facts = {"precision": precision, "size": size, "threads": torch.get_num_threads()}
            found = summary([timed_pass(model, images) for _ in range(args.rounds)], peak, facts)
            print(f"\n{precision}, {size}x{size}: {sum(row['ms'] for row in found):.0f} ms")
            print(table([{k: v for k, v in row.items() if k not in facts} for row in found[: args.rows]]))
            rows += found
    print("\nwritten to", write_rows("layers", "cpu", rows, peak_gflop_per_s=peak))


if __name__ == "__main__":
    main()
