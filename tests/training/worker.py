"""One of several processes of a run, in the environment of torchrun."""

from __future__ import annotations

from pathlib import Path

import torch

from ..helpers import runs


def gradients(task: str, root: Path, out: Path) -> None:
    """What a step's backward leaves in every process, with one image each."""
    trainer = runs.trainer(runs.tiny(task, root, batch_size=1), None)
    trainer.model.eval()  # statistics of batch norm over one image and over two are not the same
    inputs = trainer.task.prepare(next(trainer.loader.batches(0)), trainer.encode, torch.device("cpu"))
    trainer.train_step(inputs).backward()
    found = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    torch.save(found, out / f"gradients_{task}_{trainer.processes.rank}.pt")


def run(root: Path, out: Path) -> None:
    """Train with evaluation, stop, go on; one step's loss is bad in one process only."""
    from vpd_fast.training.tasks import Task

    config = runs.tiny(
        "segmentation", root, batch_size=2, schedule={"steps": 4}, checkpoints={"every_steps": 2, "keep": 5},
        evaluation={"limit": 3}, log={"tensorboard": True, "pictures": 1},
    )  # fmt: skip
    loss, calls = Task.loss, iter(range(100))
    trainer = runs.trainer(config, out / "run")
    rank = trainer.processes.rank

    def bad_once(self, model, inputs):
        value = loss(self, model, inputs)
        return value * float("nan") if next(calls) == 2 and rank == 1 else value

    Task.loss = bad_once
    summary = trainer.run()
    Task.loss = loss
    assert (summary.step, summary.skipped_steps) == (4, 1), summary
    assert any("SyncBatchNorm" in note for note in trainer.notes)
    torch.save([summary.metric, list(trainer.model.state_dict().values())], out / f"end_{rank}.pt")
    again = runs.trainer(config, out / "again", resume=out / "run/checkpoints/step_000002")
    calls = iter(range(2, 100))
    Task.loss = bad_once
    again.run()
    Task.loss = loss
    fail_to_save(config, out, rank)


def run_sharded(root: Path, out: Path) -> None:
    """Both ways to spread the work train the same; a sharded run goes on as well."""
    for name, options in (("ddp", {}), ("fsdp", {"fsdp": True})):
        config = runs.tiny(
            "referring", root, batch_size=1, accumulation=2, schedule={"steps": 2}, optimizer={"clip": 1.0, "lr": 1e-4},
            checkpoints={"every_steps": 1, "keep": 5}, evaluation={"limit": 1}, distributed=options,
        )  # fmt: skip
        trainer = runs.trainer(config, out / name)
        if name == "fsdp":
            whole = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
            mine = sum(p.to_local().numel() for p in trainer.model.parameters() if p.requires_grad)
            assert 0.4 * whole < mine < 0.6 * whole
        summary = trainer.run()
        assert summary.metric[0] == "oIoU"
    runs.trainer(config, out / "fsdp_again", resume=out / "fsdp/checkpoints/step_000001").run()


def fail_to_save(config, out: Path, rank: int) -> None:
    """An error of the process that writes is everyone's, instead of leaving the others waiting."""
    from vpd_fast.errors import CheckpointError
    from vpd_fast.training import checkpoint

    def full(path, values):
        raise OSError(28, "No space left on device")

    checkpoint.write_state = full
    try:
        runs.trainer(config.replace(checkpoints={"every_steps": 1}), out / "full").run()
    except CheckpointError as error:
        (out / f"error_{rank}.txt").write_text(str(error))


def main(root: Path, out: Path, sharded: bool) -> None:
    """What every process does: a few steps, or as many in both ways to spread the work."""
    torch.set_num_threads(1)
    if sharded:
        run_sharded(root, out)
        return
    for task in runs.TASKS:
        gradients(task, root, out)
    run(root, out)
