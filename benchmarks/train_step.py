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
import json
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vpd_fast import VPD
from vpd_fast.bench.engine_pass import MODELS
from vpd_fast.bench.environment import device_name, peak_bytes, reset_peak
from vpd_fast.bench.parity import GATES as LATENT_GATES
from vpd_fast.bench.parity import cosine, make_images
from vpd_fast.bench.timing import table, write_rows
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
    """A model with everything that a step needs; the same for every process."""

    def __init__(self, variant: Variant, model_name: str, batch: int, size: int, device: str) -> None:
        self.variant, self.device = variant, device
        model = randomize(VPD.empty(MODELS[model_name]), seed=0).to(device).train()
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
        self.batch = {"image": make_images(batch, size), "target": make_labels(batch, size, model.config.num_classes)}

    def inputs(self) -> dict[str, Tensor]:
        """What forward takes, with the latents made anew."""
        found = self.task.prepare(self.batch, self.encode, torch.device(self.device))
        if self.variant.channels_last:
            found["latents"] = found["latents"].to(memory_format=torch.channels_last)
        return found

    def run(self, around: Callable[[str], Any]) -> Tensor:
        """One step; each of its four parts inside `around(name)`. Returns the loss."""
        with around("encoder"):
            inputs = self.inputs()
        with around("forward"):
            loss = self.forward(inputs)
        with around("backward"):
            loss.backward()
        with around("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


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


# Measuring, in the variant's own process


@contextmanager
def clock(times: dict[str, list[float]], name: str, device: str) -> Iterator[None]:
    """Add the seconds of what is inside to times[name]."""
    start = time.perf_counter()
    yield
    if device == "cuda":
        torch.cuda.synchronize()
    times.setdefault(name, []).append(time.perf_counter() - start)


def first_pass(step: Step, latents: Tensor | None = None) -> tuple[dict[str, Tensor], int]:
    """{"loss", "latents", "<group>": gradients}, and bytes that forward keeps for backward.

    latents: of the baseline, from which to find loss and gradients. It is the optimizer's first step, too.
    """
    inputs = step.inputs()
    own = inputs["latents"].cpu()
    if latents is not None:
        inputs["latents"] = torch.empty_like(inputs["latents"]).copy_(latents)  # as it lies in memory
    dropouts = [
        (module, module.p) for module in step.model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)
    ]
    for module, _ in dropouts:  # what it leaves out depends on dtypes and strides
        module.p = 0.0
    if step.variant.compiled:  # whose tensors nobody but the compiler sees
        loss, kept = step.forward(inputs), 0
    else:
        with LiveMemory([*inputs.values(), *step.model.parameters(), *step.model.buffers()]) as live:
            loss = step.forward(inputs)
            kept = live.bytes()
    loss.backward()
    for module, p in dropouts:
        module.p = p
    found = {"loss": loss.detach().cpu(), "latents": own.contiguous(), **sampled_gradients(step.model, step.groups)}
    step.optimizer.step()
    step.optimizer.zero_grad(set_to_none=True)
    return found, kept


def measure(name: str, options: argparse.Namespace, batch: int, folder: Path) -> dict[str, Any]:
    """The row of a variant: agreement with the baseline, whose numbers are in `folder`, and times if that is enough."""
    variant = VARIANTS[name]
    step = Step(variant, options.model, batch, options.size, options.device)
    reference = folder / f"{batch}.safetensors"
    expected = None if name == BASELINE else load_file(reference)
    found, kept = first_pass(step, expected["latents"] if expected else None)
    if expected is None:
        save_file(found, reference)
    numbers = agreement(found, expected or found)
    passed = passes(numbers, variant)
    row = {
        "loss": round(found["loss"].item(), 5),
        "loss_difference": float(f"{numbers.pop('loss'):.3g}"),
        **{f"cosine_{group}": round(value, 6) for group, value in numbers.items()},
        "parity": "passed" if passed else "failed",
        **({"activations_gib": round(kept / 2**30, 3)} if kept else {}),
    }
    return row | timed(step, options.steps) if passed else row


def timed(step: Step, steps: int) -> dict[str, Any]:
    """Medians of some steps, and the most memory they had."""
    times: dict[str, list[float]] = {}
    cuda = step.device == "cuda"
    if cuda:
        for _ in range(2):  # more to warm up: graphs, tuning
            step.run(lambda _: clock({}, "", "cuda"))
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak()
    for _ in range(steps):
        with clock(times, "step", step.device):
            step.run(lambda name: clock(times, name, "cpu"))  # on a GPU: until its kernels are launched
    peak = torch.cuda.max_memory_allocated() if cuda else peak_bytes()
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "steps": steps,
        "p50_ms": round(1e3 * median.pop("step"), 1),
        "min_ms": round(1e3 * min(times["step"]), 1),
        "max_ms": round(1e3 * max(times["step"]), 1),
        **({} if cuda else {f"{name}_ms": round(1e3 * value, 1) for name, value in median.items()}),
        "peak_gib": round(peak / 2**30, 2),
    }


# The program


def in_own_process(arguments: list[str]) -> tuple[int, str]:
    """Exit code of this program with those arguments, and what it printed to stderr."""
    done = subprocess.run([sys.executable, __file__, *arguments], stderr=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stderr


def rows_of_batch(options: argparse.Namespace, batch: int, folder: Path) -> list[dict[str, Any]]:
    """A row per variant, each from a process of its own, ratios included."""
    rows: list[dict[str, Any]] = []
    names = [BASELINE, *(name for name in options.variants if name != BASELINE)]
    for name in names:
        row = {"case": f"{batch}x3x{options.size}x{options.size}", "variant": name}
        answer = folder / "row.json"
        answer.unlink(missing_ok=True)
        arguments = [
            "--device", options.device, "--batch", str(batch), "--size", str(options.size), "--steps",
            str(options.steps), "--model", options.model, "--one", name, str(folder),
        ]  # fmt: skip
        code, printed = in_own_process(arguments)
        if answer.exists():
            row |= json.loads(answer.read_text())
        else:
            last = next((line for line in reversed(printed.splitlines()) if line.strip()), "it printed nothing")
            row["error"] = f"the process ended with exit code {code}: {last.strip()}"
        if "p50_ms" in row and "p50_ms" in (rows or [row])[0]:
            row["speedup"] = round((rows or [row])[0]["p50_ms"] / row["p50_ms"], 2)
        rows.append(row)
        print(table([row]), flush=True)
        if name == BASELINE and "error" in row:
            break
    return rows


def estimates(options: argparse.Namespace, batch: int) -> dict[str, float]:
    """GiB of activations by `estimate_memory`: with plain attention and nothing recomputed, and with ours."""
    ways = {
        "plain, nothing recomputed": {"attention_backend": PLAIN},
        "fp32": {},
        "bf16": {"precision": "bf16"},
        "bf16 recomputed": {"precision": "bf16", "checkpointing": True},
    }
    config = MODELS[options.model]
    found = {name: estimate_memory(config, batch_size=batch, size=options.size, **way) for name, way in ways.items()}
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
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch finds no NVIDIA GPU here")
    options.variants = options.variants or DEFAULT[options.device]
    if options.one:
        name, folder = options.one[0], Path(options.one[1])
        row = measure(name, options, options.batch[0], folder)
        (folder / "row.json").write_text(json.dumps(row))
        return 0

    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {"model": options.model, "activations_gib_estimated": {}}
    with tempfile.TemporaryDirectory() as folder:
        for batch in options.batch:  # what is measured is kept if the next one is interrupted
            facts["activations_gib_estimated"][str(batch)] = estimates(options, batch)
            rows += rows_of_batch(options, batch, Path(folder))
            path = write_rows("train_step", options.device, rows, **facts)
    print(f"segmentation model on {device_name(options.device)}, random weights: {path}")
    print(table(rows))
    for batch, ways in facts["activations_gib_estimated"].items():
        print(f"activations of batch {batch}, estimated, GiB: {', '.join(f'{n} {v}' for n, v in ways.items())}")
    bad = [row["variant"] for row in rows if row.get("parity") != "passed"]
    if bad:
        print(f"failed: {', '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
