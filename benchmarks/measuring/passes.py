"""Whole passes: the engine by precision, implementation and batch, and plain PyTorch, eager and compiled."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import vpd_fast
from measuring.plan import Row, Step
from measuring.setting import STAND_IN, Setting
from vpd_fast.bench.catalog import ENTRIES, why_unusable
from vpd_fast.bench.in_process import Shared
from vpd_fast.bench.parity import Outputs, agreement, make_images, passes
from vpd_fast.bench.statistics import percentile
from vpd_fast.bench.timing import L2_FLUSH_BYTES, Stopwatch, as_graph
from vpd_fast.bench.variants import Case, ModelVariant, make_plain
from vpd_fast.engine import Policy
from vpd_fast.ops import upsample_argmax
from vpd_fast.ops._dispatch import Op

ROUNDS = 12
# With instructions, see csrc/cuda/gemm.h.
IMPLEMENTATIONS = ("auto", "cuda", "cuda:wgmma_wide", "cuda:wgmma_cluster", "cuda_rows", "triton", "library")
MOST_WANTED = [(batch, precision) for batch in (8, 1) for precision in ("int8", "bf16")]
LESS_WANTED = [*product((2, 4), ("int8", "bf16")), *product((8, 1), ("fp16", "fp8", "fp32"))]
# Plain models, the ones whose times are quoted first.
PEERS = (
    *("sdpa channels-last", "sdpa channels-last compiled", "sdpa channels-last compiled reduce-overhead"),
    *("sdpa autocast", "sdpa", "sdpa channels-last compiled max-autotune"),
)


@contextmanager
def preferred(name: str) -> Iterator[None]:
    """Within it `impl="auto"` is that implementation wherever there is one that does not refuse; "auto": no change."""
    from vpd_fast.kernels import _gemm_cuda

    choose = Op.choose
    name, _, instructions = name.partition(":")

    def prefer(op: Op, impl: str, arguments: Any) -> Any:
        candidate = op.by_name.get(name) if impl == "auto" else None
        if candidate is not None and candidate.refuse(arguments) is None:
            return candidate
        return choose(op, impl, arguments)

    with (
        mock.patch.object(Op, "choose", prefer),
        mock.patch.object(_gemm_cuda, "INSTRUCTIONS", instructions or _gemm_cuda.INSTRUCTIONS),
    ):
        yield


def ours(setting: Setting) -> Iterator[Step]:
    """A step for each batch, precision and implementation, each with its agreement with the plain model."""
    expected = functools.cache(lambda batch: _expected(setting, batch))
    wanted = setting.only(MOST_WANTED) + setting.only(LESS_WANTED, 0)
    for (batch, precision), name in product(wanted, setting.only(list(IMPLEMENTATIONS))):
        batch = 1 if setting.dry else batch
        if why_unusable(precision, setting.device) is None:
            run = functools.partial(_engine, setting, precision, name, batch, expected)
            yield Step(f"{precision} batch {batch} {name}", run, 100)


def static_rows(setting: Setting) -> Iterator[Step]:
    """int8 engines whose attention and GEGLU round for the layers after them; those of `ours` have other times."""
    batch, expected = 1 if setting.dry else 8, functools.cache(lambda batch: _expected(setting, batch))
    for name in setting.only(["auto", "cuda:wgmma_wide"]):
        run = functools.partial(_engine, setting, "int8", name, batch, expected, static_rows=True)
        yield Step(f"int8 batch {batch} {name}, static rows", run, 100)


def _expected(setting: Setting, batch: int) -> Outputs:
    """What the plain model computes in float32."""
    return _outputs(_prepared(ModelVariant(setting.plain, upsample_argmax), setting, batch))


def _prepared(variant: ModelVariant, setting: Setting, batch: int) -> ModelVariant:
    variant.prepare(Case(setting.size, batch))
    return variant


def _outputs(variant: ModelVariant) -> Outputs:
    found = variant.run()[1]
    clone = [x if x is None else x.clone() for x in (found.latents, found.logits, found.labels)]
    return Outputs(clone[0], [x.clone() for x in found.features], *clone[1:])


def _engine(
    setting: Setting,
    precision: str,
    name: str,
    batch: int,
    expected: Callable[[int], Outputs],
    static_rows: bool = False,
) -> list[Row]:
    """One row for each way to launch a pass; no times of what does not agree."""
    reference, options = expected(batch), {}
    if static_rows and not setting.dry:  # where calibration would take half a minute
        images = make_images(1, setting.size).to(setting.device)
        options = {"policy": Policy(static_rows=True, smoothing=False), "calibration": images}
    with preferred(name), torch.inference_mode():
        model = vpd_fast.optimize(setting.plain, precision, **options)
        variant = _prepared(ModelVariant(model, upsample_argmax, graphs=False), setting, batch)
        found = agreement(_outputs(variant), reference)
        facts = {"precision": precision, "implementation": name, "batch": batch}
        facts |= {"static_rows": True} if static_rows else {}
        facts |= {STAND_IN: "rows as usual"} if static_rows and setting.dry else {}
        facts |= {"cosine": min(found["features"]), "labels": found.get("labels")}
        if not passes(found, precision):
            return [{**facts, "launched": "not timed: it does not agree"}]
        calls = {"without graphs": variant.run}
        if setting.device == "cuda":
            graphs = _prepared(ModelVariant(model, upsample_argmax, graphs=True), setting, batch)
            with setting.capturing():
                calls = {"one graph": as_graph(variant.tensors), "engine's graphs": graphs.run} | calls
        times = _take_turns(setting, calls)
    rows = []
    for launched, values in times.items():
        ms = 1e3 * percentile(values, 50)
        rows.append({**facts, "launched": launched, "ms": ms, "ms_per_image": ms / batch})
    return rows


def _take_turns(setting: Setting, calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of whole passes, with a cold L2 cache, between events; in turns, so that clocks change for all alike."""
    flush = None
    if setting.device == "cuda":
        flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in calls}
    rounds = 1 if setting.dry else ROUNDS
    for turn in range(-2 if flush is not None else 0, rounds):  # two to warm up
        for name, call in calls.items():
            if flush is not None:
                flush.zero_()
            watch = Stopwatch(setting.device)
            call()
            watch.lap("pass")
            if turn >= 0:
                times[name].append(watch.seconds["pass"])
    return times


def peers(setting: Setting) -> Iterator[Step]:
    """Plain PyTorch with the same weights: at batch 8 and 1, what is quoted first."""
    folder = Path(tempfile.mkdtemp(prefix="measuring-"))
    source = Shared(setting.plain, folder, torch.get_num_threads())
    names = [name for name in PEERS if name in ENTRIES]
    for name, batch in product(setting.only(names), [1] if setting.dry else [8, 1]):
        yield Step(f"{name} batch {batch}", functools.partial(_peer, setting, source, name, batch), 100)
    if setting.dry:  # compiling takes longer than everything else here
        yield Step("compiled", functools.partial(_compiled_stand_in, setting))


def _peer(setting: Setting, source: Shared, name: str, batch: int) -> Row:
    with torch.inference_mode():
        variant = source.variant(name, ENTRIES[name].make)
        variant.prepare(Case(setting.size, batch))
        times = _take_turns(setting, {name: variant.run})[name]
    ms = 1e3 * percentile(times, 50)
    return {"peer": name, "batch": batch, "ms": ms, "ms_per_image": ms / batch}


def _compiled_stand_in(setting: Setting) -> Row:
    variant = _prepared(make_plain(Shared(setting.plain, Path(), 1), "sdpa"), setting, 1)
    times = _take_turns(setting, {"": variant.run})[""]
    return {"peer": "compiled", "batch": 1, "ms": 1e3 * percentile(times, 50), "stand_in": "eager"}
