"""Two processes on the CPU: the gradients of one, the same weights in both, and errors that reach both."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vpd_fast.training.trainer import Trainer

from ..helpers import processes, runs
from . import worker


@pytest.fixture(scope="module")
def results(data, tmp_path_factory) -> tuple[Path, Path]:
    """(data, what two processes left)."""
    out = tmp_path_factory.mktemp("out")
    processes.run_together(worker.main, [(data, out, False)] * 2, out / "log", 400)
    return data, out


@pytest.fixture(scope="module")
def trainers(data) -> Callable[[str], Trainer]:
    """The trainer of each task in one process, with batches of two; it takes no step."""
    return functools.cache(lambda task: runs.trainer(runs.tiny(task, data, batch_size=2), None))


def single(trainer: Trainer, slices: list[slice]) -> dict[str, torch.Tensor]:
    """Mean gradients of one process over parts of the batch of two that the two processes share."""
    trainer.model.eval()
    trainer.model.zero_grad(set_to_none=True)
    batch = next(trainer.loader.batches(0))
    for part in slices:
        inputs = trainer.task.prepare({k: v[part] for k, v in batch.items()}, trainer.encode, torch.device("cpu"))
        (trainer.train_step(inputs) / len(slices)).backward()
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("task", runs.TASKS)
def test_two_processes_have_the_gradients_of_one(results, trainers, task):
    out, trainer = results[1], trainers(task)
    ranks = [torch.load(out / f"gradients_{task}_{rank}.pt", weights_only=True) for rank in range(2)]
    expected = single(trainer, [slice(0, 1), slice(1, 2)])
    assert expected.keys() == ranks[0].keys() == ranks[1].keys()
    total, tolerance = norm(expected), rounding_of_gradients(trainer.model)
    for name, gradient in expected.items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        # Some gradients are zero but for rounding, such as that of a bias before a norm: they are measured against a
        # thousandth of the whole gradient.
        scale = max(gradient.norm().item(), 1e-3 * total)
        assert (ranks[0][name] - gradient).norm().item() <= tolerance * scale, name
    if task == "segmentation":
        # Its loss is a mean over pixels, so that the batch of two has this gradient as well. Two images at once are
        # added up in another order than one after the other: the gradient is compared as a whole.
        batch = single(trainer, [slice(0, 2)])
        assert norm({name: batch[name] - ranks[0][name] for name in batch}) <= tolerance * total


def rounding_of_gradients(model: torch.nn.Module) -> float:
    """Relative difference to be expected of float32 gradients whose sums were taken in two orders.

    A sum of K rounded terms is off by about sqrt(K) units, forward and again backward, and the layers' errors add up
    as independent ones do; the difference of two such gradients is sqrt(2) times as large.
    """
    terms = sum(p[0].numel() for p in model.parameters() if p.ndim > 1)
    return math.sqrt(2 * 2 * terms) * 2.0**-24


def norm(gradients: dict[str, torch.Tensor]) -> float:
    """Of all together."""
    return torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()


def test_every_trainable_parameter_has_a_gradient(results, trainers):
    """Otherwise DistributedDataParallel would wait for some."""
    for task in runs.TASKS:
        trainable = {name for name, p in trainers(task).model.named_parameters() if p.requires_grad}
        assert trainable == torch.load(results[1] / f"gradients_{task}_0.pt", weights_only=True).keys()


def test_both_end_with_the_same_model_and_metric(results):
    _, out = results
    first, second = (torch.load(out / f"end_{rank}.pt", weights_only=True) for rank in range(2))
    assert first[0] == second[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert sorted(path.name for path in (out / "run").iterdir()) == [
        "best", "checkpoints", "config.yaml", "metrics.jsonl", "tensorboard",
    ]  # fmt: skip


def test_both_go_on_bit_for_bit(results):
    _, out = results
    unbroken, resumed = (runs.weights(out / name / "checkpoints/step_000004") for name in ("run", "again"))
    assert runs.same(unbroken, resumed)
    # The step that was bad in one process was skipped in both.
    assert not runs.same(unbroken, runs.weights(out / "run/checkpoints/step_000002"))


def test_an_error_while_saving_reaches_both(results):
    _, out = results
    texts = [(out / f"error_{rank}.txt").read_text() for rank in range(2)]
    assert texts[0] == texts[1]
    assert "the disk is full" in texts[0]


@pytest.mark.slow
def test_sharded_weights_train_as_whole_ones(data, trainers, tmp_path):
    out = tmp_path
    processes.run_together(worker.main, [(data, out, True)] * 2, out / "log", 400)
    ddp, fsdp, again = (runs.weights(out / f"{name}/checkpoints/step_000002") for name in ("ddp", "fsdp", "fsdp_again"))
    assert ddp.keys() == fsdp.keys()
    assert runs.same(fsdp, again)
    begin = trainers("referring").model.state_dict()
    moved = norm({name: ddp[name] - begin[name] for name in begin if begin[name].is_floating_point()})
    apart = norm({name: ddp[name] - fsdp[name] for name in begin if begin[name].is_floating_point()})
    # Adam's first steps are nearly the sign of the gradient, which rounding decides where the gradient is zero.
    assert apart < 0.02 * moved
    assert runs.same(fsdp, runs.weights(out / "fsdp/best"))
