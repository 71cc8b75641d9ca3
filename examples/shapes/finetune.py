"""Fine-tunes VPD on the shapes world from the weights that pretrain.py made, and measures it on held-out scenes.

    python examples/shapes/finetune.py --data shapes-data --weights shapes-sd --output shapes-runs

The settings are in segmentation.yaml, referring.yaml and depth.yaml beside this file; it is what

    vpd-fast train examples/shapes/segmentation.yaml data.root=shapes-data \
        init.stable_diffusion=shapes-sd/sd.safetensors init.text_encoder=shapes-sd \
        -o shapes-runs/segmentation --resume auto

does for each of them, and it goes on after an interruption as that does. --output then has a folder per task, with
best/ for `VPD.from_pretrained` and test.json, the metrics on scenes that were not used for choosing the best weights:
of the split "test", and of "unseen", whose scenes have colours and shapes that were never together in training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from script import MAKE_WEIGHTS, require, run_script, task_names

from vpd_fast import VPD
from vpd_fast.config import TASKS
from vpd_fast.data.shapes import ShapesDataset
from vpd_fast.data.shapes.language import KINDS, kind_of
from vpd_fast.evaluation import evaluate
from vpd_fast.files import write_files
from vpd_fast.models.text import TextEncoder
from vpd_fast.training.config import TrainConfig, load_config
from vpd_fast.training.trainer import Trainer

HERE = Path(__file__).parent
SPLITS = ("test", "unseen")


def config_of(task: str, data: Path, weights: Path, overrides: list[str]) -> TrainConfig:
    """The configuration of a task with the places of data and weights."""
    places = [
        f"data.root={data}", f"init.stable_diffusion={weights / 'sd.safetensors'}", f"init.text_encoder={weights}",
    ]  # fmt: skip
    return load_config(HERE / f"{task}.yaml", [*places, *overrides])


def measure(model: VPD, data: Path, weights: Path, split: str) -> dict[str, float]:
    """Metrics of a model (plain or fast) on a split; for sentences also P@0.5 of each kind."""
    task = model.config.task
    by_task: dict[str, Any] = {"depth": {"crop": "none"}, "referring": {"text_encoder": TextEncoder(weights)}}
    options = by_task.get(task, {})
    found = evaluate(model, ShapesDataset(data, split, task=task), batch_size=8, progress=True, worst=0, **options)
    if task != "referring":
        return found.metrics
    hits: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for row in found.per_image:
        hits[kind_of(row["sentence"])].append(row["IoU"] >= 0.5)
    return found.metrics | {f"P@0.5, {kind}": statistics.mean(values) for kind, values in hits.items() if values}


def finetune(task: str, data: Path, weights: Path, output: Path, overrides: list[str]) -> None:
    """Train, then measure. Raises KeyboardInterrupt if it was stopped, with its steps saved."""
    folder = output / task
    summary = Trainer(config_of(task, data, weights, overrides), folder, resume="auto").run()
    if summary.stopped:
        raise KeyboardInterrupt
    model = VPD.from_pretrained(folder / "best")
    found = {split: measure(model, data, weights, split) for split in SPLITS}
    text = json.dumps(found, indent=2) + "\n"
    write_files({folder / "test.json": lambda path: path.write_text(text, encoding="utf-8")})
    for split, metrics in found.items():
        print(f"{task}, {split}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("shapes-data"), help="where rendered scenes are kept")
    parser.add_argument("--weights", type=Path, default=Path("shapes-sd"), help="folder that pretrain.py wrote")
    parser.add_argument("--output", type=Path, default=Path("shapes-runs"))
    parser.add_argument("--tasks", type=task_names, default=TASKS, metavar="TASK,...", help="default: all")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help="settings to change, for all tasks")
    options = parser.parse_args()
    require(options.weights / "sd.safetensors", MAKE_WEIGHTS)
    for task in options.tasks:
        finetune(task, options.data, options.weights, options.output, options.overrides)


if __name__ == "__main__":
    sys.exit(run_script(main))
