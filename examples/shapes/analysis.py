"""The analysis of the VPD paper in miniature: what pre-training, text and maps are worth, and what 8 bits cost.

    python examples/shapes/analysis.py --data shapes-data --weights shapes-sd --output shapes-analysis

Trains every variant in experiments.py a few hundred steps with three seeds, measures it on held-out scenes, and the
trained models as fast models in each precision, from images on. Rows go to --output/rows.jsonl as they are made; a run
that was stopped goes on. At the end (or with --report-only) tables and plot are made from the rows: a copy of
docs/shapes.md in --output, or that page itself with `--page docs/shapes.md`.

All variants of a seed see the same samples in the same order, through latents that are made once. Loss, groups of
parameters, schedule and batch size are those of the tasks' configurations.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiments import PRECISIONS, VARIANTS, Variant, prepare
from finetune import config_of
from models import TOKENS, Autoencoder, Denoiser
from report import require_plots, write_report
from safetensors.torch import save_file
from script import MAKE_WEIGHTS, autocast, positive, require, run_script, task_names
from torch import Tensor
from tqdm import tqdm

from vpd_fast import VPD, optimize
from vpd_fast.checkpoints import reader
from vpd_fast.config import TASKS
from vpd_fast.data.sample import Sample
from vpd_fast.data.shapes import ShapesDataset
from vpd_fast.engine import Policy
from vpd_fast.errors import InputError
from vpd_fast.evaluation import evaluate
from vpd_fast.evaluation.metrics import PRIMARY, make_metrics
from vpd_fast.files import write_files
from vpd_fast.models.text import TextEncoder
from vpd_fast.training import build
from vpd_fast.training.config import TrainConfig
from vpd_fast.training.tasks import Task, TrainStep

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "shapes.md"
Pair = tuple[int, int]  # number of a sample, number of a sentence (0 where the task has none)
EVALUATIONS = 8  # of a run whose curve is drawn


class Scenes:
    """Samples of a task with their latents, and the sentences' features, all in memory."""

    def __init__(
        self, data: Path, split: str, task: str, count: int, autoencoder: Autoencoder, text: TextEncoder
    ) -> None:
        self.dataset = ShapesDataset(data, split, task=task, length=count)
        self.samples: list[Sample] = [
            self.dataset.load(i) for i in tqdm(range(count), desc=f"{task}, {split}", leave=False)
        ]
        images = torch.from_numpy(np.stack([sample.image for sample in self.samples])).permute(0, 3, 1, 2)
        targets = np.stack([sample.target for sample in self.samples])
        self.targets = torch.from_numpy(targets if task == "depth" else targets.astype(np.int64))
        with torch.no_grad(), autocast():
            parts = [autoencoder.encode(part.float() / 127.5 - 1).float() for part in images.split(100)]
        self.latents = torch.cat(parts)
        self.tokens: list[Tensor] = []
        if task == "referring":
            self.tokens = [text.embed_sentences(sample.sentences, tokens=TOKENS) for sample in self.samples]

    def all_pairs(self) -> list[Pair]:
        """Every sentence of every sample."""
        return [(i, k) for i in range(len(self.samples)) for k in range(self._sentences(i))]

    def draw(self, count: int, generator: torch.Generator) -> list[Pair]:
        """So many samples, and a sentence of each."""
        indices = torch.randint(len(self.samples), (count,), generator=generator).tolist()
        return [
            (i, int(torch.randint(self._sentences(i), (), generator=generator)) if self.tokens else 0) for i in indices
        ]

    def batch(self, pairs: list[Pair]) -> dict[str, Tensor]:
        """What `Task.loss` takes."""
        indices = [i for i, _ in pairs]
        inputs = {"latents": self.latents[indices], "target": self.targets[indices]}
        inputs["class_id"] = torch.zeros(len(indices), dtype=torch.long)
        if self.tokens:
            inputs["tokens"] = torch.stack([self.tokens[i][k] for i, k in pairs])
        return inputs

    def _sentences(self, index: int) -> int:
        return len(self.tokens[index]) if self.tokens else 1


def train(
    model: VPD, config: TrainConfig, scenes: Scenes, held_out: Scenes, steps: int, seed: int, evaluations: int
) -> Iterator[tuple[int, float]]:
    """Train in place; (steps done, metric on held-out scenes) so many times, the last one at the end."""
    task = Task(model, config.quirks)
    precision = build.choose_precision(config.precision, model.device)
    step_module = TrainStep(model, task, torch.bfloat16 if precision == "bf16" else None)
    optimizer, schedule = build.build_optimizer(config, model, steps)
    generator = torch.Generator().manual_seed(seed)
    every = max(steps // evaluations, 1)
    for step in range(steps):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule(step)
        step_module(scenes.batch(scenes.draw(config.batch_size, generator))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % every == 0 or step + 1 == steps:
            yield step + 1, measure(model, held_out)


@torch.inference_mode()
def measure(model: VPD, scenes: Scenes) -> float:
    """The task's metric, from latents on."""
    model.eval()
    task = model.config.task
    metrics = make_metrics(model.config, crop="none")
    size = tuple(scenes.targets.shape[1:])
    pairs = scenes.all_pairs()
    for start in range(0, len(pairs), 20):
        inputs = scenes.batch(pairs[start : start + 20])
        if task == "segmentation":
            context = model.context(len(inputs["latents"]))
        else:
            context = model.context(inputs["tokens" if task == "referring" else "class_id"])
        found = model.decode(model.features(inputs["latents"], context), size)
        found = found[:, 0] if task == "depth" else found.argmax(1)
        for prediction, target in zip(found.numpy(), inputs["target"].numpy(), strict=True):
            if task == "referring":
                prediction, target = prediction.astype(bool), target.astype(bool)
            metrics.update(prediction, target)
    return float(metrics.compute()[PRIMARY[task][0]])


def run_variant(
    variant: Variant, seed: int, steps: int, data: Path, weights: Path, scenes: tuple[Scenes, Scenes], output: Path
) -> list[dict[str, Any]]:
    """Rows of one training, and of the trained model in each precision if the variant asks for it."""
    sd = weights if not variant.random else _random_weights(weights, seed, output)
    config = variant_config(variant, seed, steps, data, sd).replace(init={"text_encoder": str(weights)})
    names = ShapesDataset(None, "train", task=variant.task).class_names
    model, _ = build.build_model(config, names)
    model.attention_backend = "sdpa"
    build.own_memory(model)
    prepare(model, variant, seed)
    key = {"task": variant.task, "variant": variant.name, "seed": seed, "metric": PRIMARY[variant.task][0]}
    begun = time.perf_counter()
    rows = [
        {**key, "kind": "curve", "step": step, "value": value}
        for step, value in train(model, config, *scenes, steps, seed, EVALUATIONS if variant.curve else 1)
    ]
    rows[-1]["seconds"] = round(time.perf_counter() - begun, 1)
    if variant.precisions:
        model.eval()
        model.attention_backend = "plain"
        options: dict[str, Any] = {"crop": "none"} if variant.task == "depth" else {}
        if variant.task == "referring":
            options["text_encoder"] = TextEncoder(weights)
        for precision in PRECISIONS:
            fast = optimize(model, precision, policy=Policy(emulate=True) if precision == "fp8" else None)
            found = evaluate(fast, scenes[1].dataset, batch_size=8, worst=0, **options)
            rows.append({**key, "kind": "precision", "precision": precision, "value": found.primary[1]})
    return rows


def variant_config(variant: Variant, seed: int, steps: int, data: Path, weights: Path) -> TrainConfig:
    """The configuration of one training."""
    return config_of(variant.task, data, weights, [f"seed={seed}", f"schedule.steps={steps}", *variant.overrides])


def settings_of(variant: Variant, seed: int, options: argparse.Namespace, weights: str) -> dict[str, Any]:
    """What decides about a run's rows; weights: stands for the pre-trained weights."""
    steps = steps_of(variant, options.steps)
    config = variant_config(variant, seed, steps, Path("data"), Path("weights")).to_yaml()
    model = f"{variant.random} {variant.adapter} {variant.constants}"
    return {
        "steps": steps, "scenes": options.scenes, "held_out": options.held_out, "weights": weights[:16],
        "config": hashlib.sha256(f"{model}\n{config}".encode()).hexdigest()[:16],
    }  # fmt: skip


def steps_of(variant: Variant, steps: int) -> int:
    """How many steps a variant is trained."""
    return max(int(steps * variant.length), 1)


def _random_weights(weights: Path, seed: int, output: Path) -> Path:
    """A folder like `weights` with the same autoencoder, and a UNet as it was before pre-training."""
    torch.manual_seed(1000 + seed)
    pretrained = reader.read_file(weights / "sd.safetensors").tensors
    tensors = {k: t for k, t in pretrained.items() if k.startswith("first_stage_model.")}
    tensors |= {f"model.diffusion_model.{name}": t for name, t in Denoiser().state_dict().items()}
    folder = output / f"random-{seed}"
    write_files({folder / "sd.safetensors": lambda path: save_file(tensors, path)})
    return folder


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows so far. Raises InputError for a file of something else."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not rows of this script ({error})") from error


def run(options: argparse.Namespace) -> None:
    """All runs that are not in rows.jsonl yet, task by task."""
    path = options.output / "rows.jsonl"
    rows = read_rows(path)
    weights = hashlib.sha256((options.weights / "sd.safetensors").read_bytes()).hexdigest()
    chosen = [
        (variant, seed, settings_of(variant, seed, options, weights))
        for variant in VARIANTS
        if variant.task in options.tasks
        for seed in range(options.seeds)
    ]
    jobs = []
    for variant, seed, settings in chosen:
        key = variant.task, variant.name, seed
        before = [row for row in rows if (row["task"], row["variant"], row["seed"]) == key]
        if any(row["settings"] != settings for row in before):
            raise InputError(
                f"{path}: has {variant.task}, {variant.name} with {before[0]['settings']}, not {settings}; "
                "give another --output"
            )
        if not before:
            jobs.append((variant, seed, settings))
    autoencoder = Autoencoder()
    prefix = "first_stage_model."
    state = reader.read_file(options.weights / "sd.safetensors").tensors
    autoencoder.load_state_dict({k[len(prefix) :]: t for k, t in state.items() if k.startswith(prefix)})
    autoencoder.eval().requires_grad_(False)
    text = TextEncoder(options.weights, remember=False)
    sets: dict[str, tuple[Scenes, Scenes]] = {}
    for variant, seed, settings in tqdm(jobs, desc="runs", unit="run"):
        if variant.task not in sets:
            sets[variant.task] = tuple(
                Scenes(options.data, split, variant.task, count, autoencoder, text)
                for split, count in (("train", options.scenes), ("test", options.held_out))
            )
        new = run_variant(
            variant, seed, settings["steps"], options.data, options.weights, sets[variant.task], options.output
        )
        rows += [{**row, "settings": settings} for row in new]
        text_rows = "".join(json.dumps(row) + "\n" for row in rows)
        write_files({path: lambda temporary, content=text_rows: temporary.write_text(content, encoding="utf-8")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("shapes-data"))
    parser.add_argument("--weights", type=Path, default=Path("shapes-sd"))
    parser.add_argument("--output", type=Path, default=Path("shapes-analysis"))
    parser.add_argument("--page", type=Path, help="whose tables are made anew, default: a copy of docs/shapes.md")
    parser.add_argument("--tasks", type=task_names, default=TASKS, metavar="TASK,...", help="default: all")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--steps", type=positive, default=400)
    parser.add_argument("--scenes", type=positive, default=4000, help="to train on")
    parser.add_argument("--held-out", type=positive, default=200)
    parser.add_argument("--report-only", action="store_true", help="only make tables and plots of the rows there are")
    options = parser.parse_args()
    require_plots()  # now, not after hours
    if not options.report_only:
        require(options.weights / "sd.safetensors", MAKE_WEIGHTS)
        run(options)
    rows, page = read_rows(options.output / "rows.jsonl"), options.page
    if page is None:
        page = options.output / PAGE.name
        write_files({page: lambda path: shutil.copyfile(PAGE, path)})
    write_report(rows, page)
    print(f"wrote {page}")


if __name__ == "__main__":
    sys.exit(run_script(main))
