"""Training steps of the segmentation model, as the original takes them and as this package does: time and memory.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --device cuda --batch 1 16

A step is what the trainer does: latents by the frozen encoder, forward, loss, backward, AdamW. Weights are random, the
batch is always the same. "plain" is as the original: attention written out, every transformer block recomputed in
backward, the encoder in float32, PyTorch's AdamW as it is by default. Each variant has a process of its own, one after
another, because optimizer and gradients of one fill most of a machine. None is timed before its loss and gradients
agree with those of "plain", from the same weights and latents; the latents of its own encoder are compared apart.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vpd_fast import VPD, VPDConfig
from vpd_fast.bench.engine_pass import MODELS
from vpd_fast.bench.environment import device_name, peak_memory
from vpd_fast.bench.parity import GATES as LATENT_GATES
from vpd_fast.bench.parity import cosine, make_images
from vpd_fast.bench.timing import Stopwatch, table, write_rows
from vpd_fast.bench.variants import Case, Source
from vpd_fast.bench.worker import Worker, WorkerError
from vpd_fast.models.attention_backends import PLAIN
from vpd_fast.models.random_weights import randomize
from vpd_fast.models.unet import SpatialTransformer
from vpd_fast.training.config import QuirksConfig
from vpd_fast.training.frozen import FrozenEncoder
from vpd_fast.training.groups import parameter_groups
from vpd_fast.training.memory import LiveMemory, estimate_memory
from vpd_fast.training.tasks import Task, TrainStep

BASELINE = "plain"
SAMPLE = 4096  # entries of every gradient that are compared
LEARNING_RATE, WEIGHT_DECAY = 8e-5, 1e-3
# Relative difference of the loss, and least cosine of a group's gradients, from the same latents. Float32: as the
# features of a forward pass. bf16: autocast alone, with plain attention, costs 0.9935 to 0.9957 on the small model,
# because every product rounds what it reads, forward and backward; the squared error may be about twice that.
GATES = {"fp32": (1e-4, 0.9999), "bf16": (1e-2, 0.99)}


@dataclass(frozen=True)
class Variant:
    """How to take a step. recompute: "none", "transformers" (as the original) or "all" blocks."""

    precision: str = "fp32"
    backend: str = "sdpa"
    encoder: str = "fp32"
    recompute: str = "none"
    fused: bool = True
    channels_last: bool = False
    compiled: bool = False


VARIANTS = {
    BASELINE: Variant(backend=PLAIN, encoder="plain", recompute="transformers", fused=False),
    "plain bf16": Variant("bf16", PLAIN, "plain", "transformers", fused=False),
    "fp32": Variant(),
    "bf16": Variant("bf16", encoder="bf16"),
    "bf16 recomputed": Variant("bf16", encoder="bf16", recompute="all"),
    "bf16 channels-last": Variant("bf16", encoder="bf16", channels_last=True),
    "plain bf16 compiled": Variant("bf16", PLAIN, "plain", compiled=True),
}
DEFAULT = {"cpu": list(VARIANTS)[:-1], "cuda": list(VARIANTS)}


class Step:
    """A model with everything that a step needs, in the process that measures it; the same for every variant."""

    def __init__(self, source: Source, variant: Variant, config: VPDConfig, batch: int, size: int) -> None:
        self.variant, self.device = variant, source.device
        model = randomize(VPD.empty(config), seed=0, device=self.device).train()
        model.attention_backend = variant.backend
        set_recompute(model, variant.recompute)
        self.encode = FrozenEncoder(model, variant.encoder)
        if variant.channels_last:
            model.to(memory_format=torch.channels_last)
        self.model, self.task = model, Task(model, QuirksConfig())
        groups = parameter_groups(model, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, preset="segmentation")
        self.groups = {group["name"]: group["params"] for group in groups}
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=variant.fused or None)
        dtype = torch.bfloat16 if variant.precision == "bf16" else None
        module: nn.Module = TrainStep(model, self.task, dtype)
        self.forward = torch.compile(module) if variant.compiled else module
        self.batch = {"image": make_images(batch, size), "target": make_labels(batch, size, config.num_classes)}

    def inputs(self) -> dict[str, Tensor]:
        """What forward takes, with the latents made anew."""
        found = self.task.prepare(self.batch, self.encode, torch.device(self.device))
        if self.variant.channels_last:
            found["latents"] = found["latents"].to(memory_format=torch.channels_last)
        return found

    def optimize(self) -> None:
        """The end of a step: new weights, and no gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def run(self) -> tuple[Tensor, dict[str, float]]:
        """One step: the loss, and the seconds of its four parts."""
        watch = Stopwatch(self.device)
        inputs = self.inputs()
        watch.lap("encoder")
        loss = self.forward(inputs)
        watch.lap("forward")
        loss.backward()
        watch.lap("backward")
        self.optimize()
        watch.lap("optimizer")
        return loss.detach(), watch.seconds

    def first_pass(self, latents: Tensor | None = None) -> tuple[dict[str, Tensor], int]:
        """{"loss", "latents", "<group>": gradients}, and bytes that forward keeps for backward.

        latents: of the baseline, from which to find loss and gradients. It is the optimizer's first step, too.
        """
        inputs = self.inputs()
        own = inputs["latents"].cpu()
        if latents is not None:
            inputs["latents"] = torch.empty_like(inputs["latents"]).copy_(latents)  # as it lies in memory
        dropouts = [(m, m.p) for m in self.model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
        for module, _ in dropouts:  # what it leaves out depends on dtypes and strides
            module.p = 0.0
        if self.variant.compiled:  # whose tensors nobody but the compiler sees
            loss, kept = self.forward(inputs), 0
        else:
            with LiveMemory([*inputs.values(), *self.model.parameters(), *self.model.buffers()]) as live:
                loss = self.forward(inputs)
                kept = live.bytes()
        loss.backward()
        for module, p in dropouts:
            module.p = p
        gradients = sampled_gradients(self.model, self.groups)
        self.optimize()
        return {"loss": loss.detach().cpu(), "latents": own.contiguous(), **gradients}, kept

    def measure(self, steps: int, reference: Path, is_baseline: bool) -> dict[str, Any]:
        """The row of the variant: agreement with the baseline, and times if that is enough.

        reference: the file with the baseline's numbers, which the baseline writes.
        """
        expected = None if is_baseline else load_file(reference)
        found, kept = self.first_pass(expected["latents"] if expected else None)
        if expected is None:
            save_file(found, reference)
        numbers = agreement(found, expected or found)
        passed = passes(numbers, self.variant)
        row = {
            "loss": round(found["loss"].item(), 5),
            "loss_difference": float(f"{numbers.pop('loss'):.3g}"),
            **{f"cosine_{group}": round(value, 6) for group, value in numbers.items()},
            "parity": "passed" if passed else "failed",
            **({"activations_gib": round(kept / 2**30, 3)} if kept else {}),
        }
        return row | self.timed(steps) if passed else row

    def timed(self, steps: int) -> dict[str, Any]:
        """Medians of some steps, and the most memory they had."""
        for _ in range(2 if self.device == "cuda" else 0):  # more to warm up: graphs, tuning
            self.run()
        passes, _, peak = peak_memory(self.device, lambda: [self.run()[1] for _ in range(steps)])
        times = {"p50_ms": [sum(seconds.values()) for seconds in passes]}
        times |= {f"{name}_ms": [seconds[name] for seconds in passes] for name in passes[0]}
        row = {name: round(1e3 * statistics.median(values), 1) for name, values in times.items()}
        row |= {f"{of.__name__}_ms": round(1e3 * of(times["p50_ms"]), 1) for of in (min, max)}
        return {"steps": steps, **row, "peak_gib": round(peak / 2**30, 2)}


def set_recompute(model: VPD, what: str) -> None:
    """Which blocks are recomputed in backward."""
    model.gradient_checkpointing_enable(what == "all")
    if what == "transformers":
        for module in model.modules():
            if isinstance(module, SpatialTransformer):
                module.gradient_checkpointing = True


def make_labels(batch: int, size: int, classes: int) -> Tensor:
    """Labels (batch,size,size), always the same: patches of 32 pixels, one in ten ignored."""
    generator = torch.Generator().manual_seed(size + 1)
    side = -(-size // 32)
    patches = torch.randint(classes, (batch, side, side), generator=generator)
    patches[torch.rand(patches.shape, generator=generator) < 0.1] = 255
    return patches.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :size, :size].contiguous()


# Agreement


def sampled_gradients(model: VPD, groups: dict[str, list[nn.Parameter]]) -> dict[str, Tensor]:
    """Entries of every group's gradients at fixed places, each tensor weighted as if all of it was there."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for group, parameters in groups.items():
        parts = []
        for parameter in parameters:
            assert parameter.grad is not None, names[parameter]
            gradient = parameter.grad.detach().float().contiguous().view(-1)
            count = min(SAMPLE, gradient.numel())
            if count < gradient.numel():
                generator = torch.Generator().manual_seed(zlib.crc32(names[parameter].encode()))
                places = torch.randint(gradient.numel(), (count,), generator=generator)
                gradient = gradient[places.to(gradient.device)] * (gradient.numel() / count) ** 0.5
            parts.append(gradient.cpu())
        found[group] = torch.cat(parts)
    return found


def agreement(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """{"loss"}: relative difference, {"latents", "<group>"}: cosines, of gradients for a group."""
    loss = abs(found["loss"].item() - expected["loss"].item()) / abs(expected["loss"].item())
    return {"loss": loss} | {name: cosine(found[name], t) for name, t in expected.items() if name != "loss"}


def passes(numbers: dict[str, float], variant: Variant) -> bool:
    """Whether all are within the gates; NaN is not."""
    loss, least = GATES[variant.precision]
    gradients = [value for name, value in numbers.items() if name not in ("loss", "latents")]
    latents = numbers["latents"] >= LATENT_GATES["fp32" if variant.encoder == "plain" else variant.encoder]
    return latents and numbers["loss"] <= loss and all(value >= least for value in gradients)


# The program


def rows_of_batch(options: argparse.Namespace, batch: int, source: Source) -> list[dict[str, Any]]:
    """A row per variant, each from a process of its own, ratios included."""
    rows: list[dict[str, Any]] = []
    for name in [BASELINE, *(name for name in options.variants if name != BASELINE)]:
        row = {"case": str(Case(options.size, batch)), "variant": name}
        sizes = {"config": MODELS[options.model], "batch": batch, "size": options.size}
        worker = Worker(partial(Step, variant=VARIANTS[name], **sizes), source, name)
        try:
            worker.wait()
            reference = source.scratch / f"{batch}.safetensors"
            row |= worker.call("measure", options.steps, reference, name == BASELINE)
        except WorkerError as error:
            row["error"] = str(error)
        finally:
            worker.close()
        rows.append(row)
        if "p50_ms" in row and "p50_ms" in rows[0]:
            row["speedup"] = round(rows[0]["p50_ms"] / row["p50_ms"], 2)
        print(table([row]), flush=True)
        if name == BASELINE and "error" in row:
            break
    return rows


def estimates(config: VPDConfig, batch: int, size: int) -> dict[str, float]:
    """GiB of activations by `estimate_memory`: with plain attention and nothing recomputed, and with ours."""
    ways = {
        "plain, nothing recomputed": {"attention_backend": PLAIN},
        "fp32": {},
        "bf16": {"precision": "bf16"},
        "bf16 recomputed": {"precision": "bf16", "checkpointing": True},
    }
    found = {name: estimate_memory(config, batch_size=batch, size=size, **way) for name, way in ways.items()}
    return {name: round(parts["activations"] / 2**30, 3) for name, parts in found.items()}


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints a table and stores the rows. Returns 1 if a variant failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels, a multiple of 64")
    parser.add_argument("--steps", type=int, default=5, help="that are timed, after one or more to warm up")
    parser.add_argument("--variants", choices=list(VARIANTS), nargs="+", help="besides plain (default: for the device)")
    parser.add_argument("--model", choices=list(MODELS), default="full", help="small: a fifth as wide, for a quick try")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch finds no NVIDIA GPU here")
    options.variants = options.variants or DEFAULT[options.device]

    rows: list[dict[str, Any]] = []
    estimated: dict[str, dict[str, float]] = {}
    facts = {"model": options.model, "activations_gib_estimated": estimated}
    with tempfile.TemporaryDirectory() as folder:
        source = Source(Path(folder), Path(folder), torch.get_num_threads(), options.device)
        for batch in options.batch:  # what is measured is kept if the next one is interrupted
            estimated[str(batch)] = estimates(MODELS[options.model], batch, options.size)
            rows += rows_of_batch(options, batch, source)
            path = write_rows("train_step", options.device, rows, **facts)
    print(f"segmentation model on {device_name(options.device)}, random weights: {path}")
    print(table(rows))
    for batch, ways in estimated.items():
        print(f"activations of batch {batch}, estimated, GiB: {', '.join(f'{n} {v}' for n, v in ways.items())}")
    bad = [row["variant"] for row in rows if row.get("parity") != "passed"]
    if bad:
        print(f"failed: {', '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
