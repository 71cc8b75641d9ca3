"""The analysis of the VPD paper in miniature: what pre-training, text and maps are worth, and what 8 bits cost.

    python examples/shapes/analysis.py --data shapes-data --weights shapes-sd --output shapes-analysis

Trains every variant in experiments.py a few hundred steps with three seeds, measures it on held-out scenes on the way,
and the trained models as fast models in each precision. Rows go to --output/rows.jsonl as they are made; a run that was
stopped goes on. At the end (or with --report-only) the tables in docs/shapes.md and its plots are made from the rows.

All variants see the same scenes in the same order, through latents that are made once. Loss, groups of parameters and
schedule are the trainer's.
"""

from __future__ import annotations

import argparse
import json
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
from report import write_report
from safetensors.torch import save_file
from script import positive, run_script, task_names
from torch import Tensor
from tqdm import tqdm

from vpd_fast import VPD, optimize
from vpd_fast.checkpoints import reader
from vpd_fast.config import TASKS
from vpd_fast.data.sample import Sample
from vpd_fast.data.shapes import ShapesDataset
from vpd_fast.engine import Policy
from vpd_fast.errors import InputError
from vpd_fast.evaluation.metrics import PRIMARY, make_metrics
from vpd_fast.files import write_files
from vpd_fast.models.text import TextEncoder
from vpd_fast.training import build
from vpd_fast.training.config import TrainConfig
from vpd_fast.training.tasks import Task, TrainStep

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "shapes.md"
BATCH = 16
EVALUATIONS = 8  # per run


class Scenes:
    """Samples of a task with their latents, and the sentences' features, all in memory."""

    def __init__(
        self, data: Path, split: str, task: str, count: int, autoencoder: Autoencoder, text: TextEncoder
    ) -> None:
        dataset = ShapesDataset(data, split, task=task, length=count)
        self.samples: list[Sample] = [dataset.load(i) for i in tqdm(range(count), desc=f"{task}, {split}", leave=False)]
        images = torch.from_numpy(np.stack([sample.image for sample in self.samples])).permute(0, 3, 1, 2)
        targets = np.stack([sample.target for sample in self.samples])
        self.targets = torch.from_numpy(targets if task == "depth" else targets.astype(np.int64))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            parts = [autoencoder.encode(part.float() / 127.5 - 1).float() for part in images.split(100)]
        self.latents = torch.cat(parts)
        self.tokens: list[Tensor] = []
        if task == "referring":
            self.tokens = [text.embed_sentences(sample.sentences, tokens=TOKENS) for sample in self.samples]

    def batch(self, indices: list[int], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """What `Task.loss` takes; a sentence at random, without a generator the first."""
        inputs = {"latents": self.latents[indices], "target": self.targets[indices]}
        inputs["class_id"] = torch.zeros(len(indices), dtype=torch.long)
        if self.tokens:
            chosen = [self.tokens[i] for i in indices]
            picks = [0 if generator is None else int(torch.randint(len(t), (), generator=generator)) for t in chosen]
            inputs["tokens"] = torch.stack([t[pick] for t, pick in zip(chosen, picks, strict=True)])
        return inputs


def train(
    model: VPD, config: TrainConfig, scenes: Scenes, held_out: Scenes, steps: int, seed: int
) -> Iterator[tuple[int, float]]:
    """Train in place; (steps done, metric on held-out scenes) on the way and at the end."""
    task = Task(model, config.quirks)
    step_module = TrainStep(model, task, torch.bfloat16)
    optimizer, schedule = build.build_optimizer(config, model, steps)
    generator = torch.Generator().manual_seed(seed)
    every = max(steps // EVALUATIONS, 1)
    for step in range(steps):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule(step)
        indices = torch.randint(len(scenes.samples), (BATCH,), generator=generator).tolist()
        step_module(scenes.batch(indices, generator)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % every == 0 or step + 1 == steps:
            yield step + 1, measure(model, held_out)


@torch.inference_mode()
def measure(model: Any, scenes: Scenes) -> float:
    """The task's metric of a plain or fast model."""
    if isinstance(model, torch.nn.Module):
        model.eval()
    task = model.config.task
    metrics = make_metrics(model.config, crop="none")
    size = tuple(scenes.targets.shape[1:])
    for indices in torch.arange(len(scenes.samples)).split(20):
        inputs = scenes.batch(indices.tolist())
        if task == "segmentation":
            context = model.context(len(indices))
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
    overrides = [f"seed={seed}", f"schedule.steps={steps}", f"batch_size={BATCH}", *variant.overrides]
    config = config_of(variant.task, data, sd, [*overrides, f"init.text_encoder={weights}"])
    names = ShapesDataset(None, "train", task=variant.task).class_names
    model, _ = build.build_model(config, names)
    model.attention_backend = "sdpa"
    build.own_memory(model)
    prepare(model, variant, seed)
    key = {"task": variant.task, "variant": variant.name, "seed": seed, "metric": PRIMARY[variant.task][0]}
    begun = time.perf_counter()
    rows = [
        {**key, "kind": "curve", "step": step, "value": value}
        for step, value in train(model, config, scenes[0], scenes[1], steps, seed)
    ]
    rows[-1]["seconds"] = round(time.perf_counter() - begun, 1)
    if variant.precisions:
        model.eval()
        model.attention_backend = "plain"
        for precision in PRECISIONS:
            fast = optimize(model, precision, policy=Policy(emulate=True) if precision == "fp8" else None)
            rows.append({**key, "kind": "precision", "precision": precision, "value": measure(fast, scenes[1])})
    return rows


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
    settings = {"steps": options.steps, "scenes": options.scenes, "held_out": options.held_out}
    if any(row["settings"] != settings for row in rows):
        raise InputError(f"{path}: has runs with {rows[0]['settings']}, not {settings}; give another --output")
    autoencoder = Autoencoder()
    prefix = "first_stage_model."
    state = reader.read_file(options.weights / "sd.safetensors").tensors
    autoencoder.load_state_dict({k[len(prefix) :]: t for k, t in state.items() if k.startswith(prefix)})
    autoencoder.eval().requires_grad_(False)
    text = TextEncoder(options.weights, remember=False)
    done = {(row["task"], row["variant"], row["seed"]) for row in rows}
    chosen = [variant for variant in VARIANTS if variant.task in options.tasks]
    jobs = [(v, seed) for v in chosen for seed in range(options.seeds) if (v.task, v.name, seed) not in done]
    sets: dict[str, tuple[Scenes, Scenes]] = {}
    for variant, seed in tqdm(jobs, desc="runs", unit="run"):
        if variant.task not in sets:
            sets[variant.task] = tuple(
                Scenes(options.data, split, variant.task, count, autoencoder, text)
                for split, count in (("train", options.scenes), ("test", options.held_out))
            )
        steps = max(int(options.steps * variant.length), 1)
        new = run_variant(variant, seed, steps, options.data, options.weights, sets[variant.task], options.output)
        rows += [{**row, "settings": settings} for row in new]
        text_rows = "".join(json.dumps(row) + "\n" for row in rows)
        write_files({path: lambda temporary, content=text_rows: temporary.write_text(content, encoding="utf-8")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("shapes-data"))
    parser.add_argument("--weights", type=Path, default=Path("shapes-sd"))
    parser.add_argument("--output", type=Path, default=Path("shapes-analysis"))
    parser.add_argument("--page", type=Path, default=PAGE, help="whose tables are made anew")
    parser.add_argument("--tasks", type=task_names, default=TASKS, metavar="TASK,...", help="default: all")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--steps", type=positive, default=400)
    parser.add_argument("--scenes", type=positive, default=4000, help="to train on")
    parser.add_argument("--held-out", type=positive, default=200)
    parser.add_argument("--report-only", action="store_true", help="only make tables and plots of the rows there are")
    options = parser.parse_args()
    if not options.report_only:
        run(options)
    write_report(read_rows(options.output / "rows.jsonl"), options.page)


if __name__ == "__main__":
    sys.exit(run_script(main))
