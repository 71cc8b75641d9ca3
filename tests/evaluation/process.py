"""One of two processes that evaluate together."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from vpd_fast import VPD, VPDConfig
from vpd_fast.cli.options import random_tokens
from vpd_fast.errors import VPDFastError
from vpd_fast.evaluation import evaluate
from vpd_fast.models.random_weights import randomize

from ..helpers.backbones import TINY
from .sets import BROKEN, MemoryDataset, make_dataset

TASKS = ("segmentation", "referring", "depth")


def embed(sentences):
    return random_tokens(list(sentences), 8, 64)


def measure(task: str, dataset: MemoryDataset, **options):
    """Metrics, rows and the rest, without what takes time."""
    config = VPDConfig(task=task, num_classes=5, num_scenes=3, tokens=8, channels=32, base_size=64, backbone=TINY)
    found = evaluate(randomize(VPD(config), 1), dataset, text_encoder=embed, worst=3, **options)
    found.seconds = 0.0
    return {**found.summary(), "rows": found.per_image, "classes": found.per_class, "worst": found.worst}


def dataset_with_a_broken_one(task: str) -> MemoryDataset:
    dataset = make_dataset(task, 5, (50, 60))
    dataset.samples[3] = BROKEN
    return dataset


def main(rank: int, store: str, result: str) -> None:
    """What the process finds is pickled into `result`."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    group = {"rank": rank, "world_size": 2}
    found = {task: measure(task, dataset_with_a_broken_one(task), **group) for task in TASKS}
    found["one sample"] = measure("depth", make_dataset("depth", 1, (50, 60)), **group)
    try:
        measure("depth", dataset_with_a_broken_one("depth"), strict=True, **group)
    except VPDFastError as error:
        found["strict"] = f"{type(error).__name__}: {error}"
    torch.distributed.destroy_process_group()
    Path(result).write_bytes(pickle.dumps(found))
