"""Whole segmentation passes with labels, random weights: plain models, compiled ones, and fast ones in every precision.

    python benchmarks/e2e.py --device cuda --batch 1 8
    python benchmarks/e2e.py --device cpu --rounds 3

All variants are in one process and take turns. None is timed before its features and logits agree with plain float32.
On a GPU every call begins with a cold L2 cache and is timed between two events, twice: as called ("calls": with all
that the CPU has to do) and, but for compiled ones, as the replay of one CUDA graph of the whole pass ("replays").
Fast models have CUDA graphs of their own, which their "calls" use unless it says "without graphs". Labels of a plain
model are interpolate and argmax, of a fast one `upsample_argmax`. `vpd-fast bench` has a process for each variant.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import vpd_fast
from vpd_fast import VPD
from vpd_fast.bench import telemetry
from vpd_fast.bench.engine_pass import MODELS
from vpd_fast.bench.environment import peak_bytes, reset_peak
from vpd_fast.bench.operations import ValuesAreFine
from vpd_fast.bench.parity import GATES, Outputs, agreement, make_images, passes
from vpd_fast.bench.timing import device_name, measure, rows_of, table, write_rows
from vpd_fast.bench.variants import plain_labels
from vpd_fast.engine import FastVPD
from vpd_fast.engine.policy import PRECISIONS
from vpd_fast.errors import InputError, MissingDependencyError
from vpd_fast.models.attention_backends import BACKENDS, PLAIN
from vpd_fast.models.random_weights import randomize
from vpd_fast.ops import upsample_argmax

BASELINE = f"fp32 {PLAIN}"
SECONDS = 120  # for the rounds of one batch size


@dataclass(frozen=True)
class Variant:
    """One way to compute the pass. precision: whose gate it must pass. replay: may be captured in a CUDA graph."""

    name: str
    precision: str
    run: Callable[[Tensor], Outputs]
    weights: int  # bytes that are its own
    replay: bool = True


def plain_pass(model: VPD, images: Tensor) -> Outputs:
    """Stage by stage, as `model(images)` does, with labels of full size."""
    latents = model.encode(images)
    features = model.features(latents, model.context(len(images)))
    logits = model.decode(features)
    return Outputs(latents, features, logits, plain_labels(logits, images.shape[2:], False))


def fast_pass(model: FastVPD, images: Tensor) -> Outputs:
    """Likewise, with the labels that a fast model makes."""
    latents = model.encode(images)
    features = model.features(latents, model.context(len(images)))
    logits = model.decode(features)
    return Outputs(latents, features, logits, upsample_argmax(logits, images.shape[2:]))


def with_backend(model: VPD, backend: str, dtype: torch.dtype | None = None) -> VPD:
    """A model with another backend, of the same parameters in the same memory, or of copies in another dtype."""
    other, state = VPD.empty(model.config), model.state_dict()
    if dtype is not None:
        state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    other.load_state_dict(state, assign=True)
    other.attention_backend = backend
    return other.eval()


def nbytes(model: VPD) -> int:
    """Memory of its parameters and buffers, and of its layers if it is fast."""
    tensors = sum(t.nbytes for t in model.state_dict().values())
    return tensors + (model.report().bytes if isinstance(model, FastVPD) else 0)


def plain_variants(model: VPD, backend: str, device: str) -> Iterator[Variant]:
    """Float32, bfloat16 by autocast, bfloat16 weights in channels-last; the last also compiled, on a GPU."""
    this = model if backend == PLAIN else with_backend(model, backend)
    own = nbytes(model)
    yield Variant(f"fp32 {backend}", "fp32", lambda images: plain_pass(this, images), own)

    def autocast(images: Tensor) -> Outputs:
        with torch.autocast(device, torch.bfloat16):
            return plain_pass(this, images)

    yield Variant(f"bf16 autocast {backend}", "bf16", autocast, own)
    if backend == PLAIN or device == "cpu":
        return
    half = with_backend(model, backend, torch.bfloat16).to(memory_format=torch.channels_last)

    def channels_last(images: Tensor) -> Outputs:
        return plain_pass(half, images.to(torch.bfloat16, memory_format=torch.channels_last))

    yield Variant(f"bf16 channels-last {backend}", "bf16", channels_last, nbytes(half))
    yield compiled(Variant(f"bf16 channels-last {backend}", "bf16", channels_last, nbytes(half)))


def compiled(variant: Variant) -> Variant:
    """The variant under torch.compile(mode="max-autotune"), which brings its own CUDA graphs."""

    def tensors(images: Tensor) -> tuple:
        found = variant.run(images)
        return found.latents, found.features, found.logits, found.labels

    program = torch.compile(tensors, mode="max-autotune", dynamic=False)

    def run(images: Tensor) -> Outputs:
        torch.compiler.cudagraph_mark_step_begin()
        return Outputs(*program(images))

    return replace(variant, name=f"{variant.name} compiled", run=run, replay=False)


def fast_variants(model: VPD, precision: str, device: str) -> Iterator[Variant]:
    """`vpd_fast.optimize`, on a GPU with and without its CUDA graphs."""
    fast = vpd_fast.optimize(model, precision)

    def variant(name: str, graphs: bool, replay: bool) -> Variant:
        def run(images: Tensor) -> Outputs:
            fast.graphs = graphs
            return fast_pass(fast, images)

        return Variant(name, precision, run, nbytes(fast), replay)

    yield variant(f"fast {precision}", True, True)
    if device == "cuda":
        yield variant(f"fast {precision} without graphs", False, False)


def make_variants(model: VPD, backends: list[str], precisions: list[str], compile_too: bool) -> Iterator[Variant]:
    """All of them, without those that cannot be had here, of which a line says why."""
    device = model.device.type
    makers = {f"backend {name}": lambda n=name: plain_variants(model, n, device) for name in (PLAIN, *backends)}
    makers |= {f"fast {p}": lambda p=p: fast_variants(model, p, device) for p in precisions}
    for name, make in makers.items():
        if name.startswith("fast") and name.partition(" ")[2] not in GATES:
            print(f"left out: {name}: there is no gate of agreement for it")
            continue
        try:
            for variant in make():
                if compile_too or not variant.name.endswith("compiled"):
                    yield variant
        except (InputError, MissingDependencyError) as error:
            print(f"left out: {name}: {error}")


def outputs_and_memory(device: str, variant: Variant, images: Tensor) -> tuple[Outputs, float]:
    """What one call gives, and the peak memory in GiB: of the variant alone on a GPU, of the process on Linux."""
    if device == "cpu":
        reset_peak()
        return variant.run(images), peak_bytes() / 2**30
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = variant.run(images)
    torch.cuda.synchronize()
    return outputs, (variant.weights + torch.cuda.max_memory_allocated() - before) / 2**30


def on_cpu(outputs: Outputs) -> Outputs:
    """Copies, which nothing overwrites."""
    features = [x.float().cpu().clone() for x in outputs.features]
    parts = {name: getattr(outputs, name).cpu().clone() for name in ("latents", "logits", "labels")}
    return Outputs(features=features, **parts)


@torch.inference_mode()
def check(variants: list[Variant], images: Tensor) -> tuple[dict[str, dict[str, Any]], list[Variant]]:
    """Facts about each variant, with "parity" and maybe "error"; the variants that may be timed."""
    facts: dict[str, dict[str, Any]] = {}
    expected, timed = None, []
    for variant in variants:
        try:
            outputs, peak = outputs_and_memory(images.device.type, variant, images)
            outputs = on_cpu(outputs)
        except InputError as error:
            print(f"left out: {variant.name}: {error}")
            continue
        except RuntimeError as error:  # out of memory, or a compiler that gives up
            if expected is None:
                raise
            facts[variant.name] = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
            continue
        expected = outputs if expected is None else expected  # the baseline comes first
        found = agreement(outputs, expected)
        passed = passes(found, variant.precision)
        facts[variant.name] = {
            "peak_gib": round(peak, 2),
            "cosine": round(found["logits"], 6),
            "features_cosine": round(min(found["features"]), 6),
            "equal_labels": round(found["labels"], 5),
            "parity": "passed" if passed else "failed",
        }
        timed += [variant] if passed else []
    return facts, timed


def ways(timed: list[Variant], device: str) -> dict[str, tuple[list[Variant], bool]]:
    """How to time: name -> the variants, and whether they are captured in one CUDA graph each."""
    found = {"calls": (timed, False)}
    return found | ({"replays": ([v for v in timed if v.replay], True)} if device == "cuda" else {})


def timed_rows(timed: list[Variant], images: Tensor, rounds: int, **facts: Any) -> list[dict[str, Any]]:
    """Times of the variants that agree, in every way of timing."""
    device, rows = images.device.type, []
    for way, (variants, graphs) in ways(timed, device).items():
        sampled = telemetry.Telemetry(device)
        calls = {v.name: lambda v=v: v.run(images) for v in variants}
        with torch.inference_mode(), ValuesAreFine() if graphs else contextlib.nullcontext():
            times = measure(calls, device, rounds=rounds, seconds=SECONDS, graphs=graphs, after=sampled)
        for row in rows_of(times, BASELINE, **facts, **({"timed": way} if device == "cuda" else {})):
            row["ms_per_image"] = round(row["p50_ms"] / len(images), 4)
            rows.append(row | (sampled.medians(row["variant"]) if device == "cuda" else {}))
    return rows


def measured_rows(variants: list[Variant], images: Tensor, rounds: int, **facts: Any) -> list[dict[str, Any]]:
    """One row per variant and way of timing; without times for those that failed."""
    found, timed = check(variants, images)
    facts |= {"case": "x".join(map(str, images.shape)), "threads": torch.get_num_threads()}
    rows = [row | found[row["variant"]] for row in timed_rows(timed, images, rounds, **facts)]
    failed = [name for name in found if name not in {variant.name for variant in timed}]
    return rows + [facts | {"variant": name} | found[name] for name in failed]


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints a table and stores the rows. Returns 1 if a variant failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels, a multiple of 64")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--backends", choices=BACKENDS[1:], nargs="+", default=["sdpa"], help="besides plain")
    parser.add_argument("--precision", choices=list(PRECISIONS), nargs="*", help="of fast models (default: all on a "
                        "GPU, none on a CPU, where vpd-fast bench measures them)")  # fmt: skip
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes minutes")
    parser.add_argument("--model", choices=list(MODELS), default="full", help="small: a fifth as wide, for a quick try")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch finds no NVIDIA GPU here")

    default = list(PRECISIONS) if options.device == "cuda" else []
    precisions = default if options.precision is None else options.precision
    model = randomize(VPD.empty(MODELS[options.model]), seed=0).eval().to(options.device)
    variants = list(make_variants(model, options.backends, precisions, not options.no_compile))
    facts, rows = {"model": options.model} if options.model != "full" else {}, []
    also = telemetry.facts() if options.device == "cuda" else {}
    for batch in options.batch:  # what is measured is kept if the next one is interrupted
        rows += measured_rows(variants, make_images(batch, options.size).to(options.device), options.rounds, **facts)
        path = write_rows("e2e", options.device, rows, **also)
    print(f"segmentation model on {device_name(options.device)}, random weights: {path}")
    print(table(rows))
    bad = [row["variant"] for row in rows if row.get("parity") != "passed"]
    if bad:
        print(f"failed: {', '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
