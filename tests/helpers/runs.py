"""Tiny runs of each task on miniature data sets, in this process or in another."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from vpd_fast.training.config import TrainConfig, merge

from . import miniature
from .backbones import TINY

TASKS = ("segmentation", "referring", "depth")
KINDS = {"segmentation": "ade20k", "referring": "refcoco", "depth": "nyu"}
BACKBONE = vars(TINY)
TOKENS = 8


def make_data(root: Path, task: str) -> Path:
    """A data set in the real folder format."""
    write = {"segmentation": miniature.ade20k, "referring": miniature.refer, "depth": miniature.nyu}
    return write[task](root / task)


def tiny(task: str, root: Path, **changes) -> TrainConfig:
    """Six steps, saved every three."""
    values = {
        "task": task,
        "model": {"backbone": BACKBONE, "base_size": 64},
        "init": {"random": 1},
        "data": {
            "kind": KINDS[task], "root": str(root / task), "size": 64, "workers": 0,
            "train_split": "training" if task == "segmentation" else "train",
            "val_split": {"segmentation": "validation", "referring": "val", "depth": "test"}[task],
        },
        "optimizer": {"lr": 1e-3},
        "schedule": {"name": "poly", "steps": 6},
        "precision": "fp32",
        "encoder": {"precision": "fp32"},
        "checkpoints": {"every_steps": 3, "keep": 5},
        "evaluation": {"limit": 1},
        "log": {"every": 1, "tensorboard": False},
        "device": "cpu",
    }  # fmt: skip
    if task == "segmentation":
        names = ["ground", *miniature.NAMES]
        values["data"]["options"] = {"classes": names}
        values["model"] |= {"channels": 32}
    elif task == "referring":
        values["model"] |= {"tokens": TOKENS}
    values = merge(values, changes)
    values["data"]["options"] = values["data"].get("options") or {}
    return TrainConfig.from_dict(values)


def sentences(texts) -> torch.Tensor:
    """Token features made from the letters, in place of CLIP's."""
    from vpd_fast.cli.options import random_tokens

    return random_tokens(list(texts), TOKENS, BACKBONE["context_dim"])


def trainer(config: TrainConfig, folder: Path | None, **options):
    """A Trainer that needs no CLIP."""
    from vpd_fast.training.trainer import Trainer

    return Trainer(config, folder, sentences=sentences if config.task == "referring" else None, bar=False, **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a checkpoint or a model's folder."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def entries(folder: Path) -> list[dict]:
    """What a run wrote to metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
