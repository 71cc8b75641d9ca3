"""`vpd-fast train`: fine-tune a model, alone or as one of the processes of torchrun or accelerate launch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vpd_fast.errors import InputError
from vpd_fast.tasks import TASKS

if TYPE_CHECKING:
    from vpd_fast.training.config import TrainConfig
    from vpd_fast.training.trainer import Summary, Trainer

GIB = 2**30
STOPPED = 130


def train(
    config: Annotated[
        str,
        typer.Argument(
            metavar="PRESET|CONFIG.yaml",
            help="ade20k, refcoco, refcoco+, refcocog or nyu (the original's settings), or a file; a file may say "
            "`base: ade20k` and only what is different.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings to change, such as data.root=/data/ADE20K."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Where the run goes; not needed for --dry-run."),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|PATH",
            help="auto: go on with the run in FOLDER if there is one. never: FOLDER must be empty. PATH: a checkpoint.",
        ),
    ] = "never",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Build everything, say how much memory it takes, how it would train and whether labels look wrong, "
            "try one batch, write nothing.",
        ),
    ] = False,
    step: Annotated[bool, typer.Option("--step/--no-step", help="Whether --dry-run tries a batch.")] = True,
) -> None:
    """Train a model on a data set.

    FOLDER then holds

    - best/: the best model by the task's metric (mIoU, oIoU or RMSE), for `--checkpoint`

    - checkpoints/: the last ones, to resume from

    - metrics.jsonl and tensorboard/: losses, metrics and pictures

    - config.yaml: every setting of the run

    Stopped by Ctrl-C or SIGTERM, it saves first and ends with code 130; `--resume auto` then goes on as if nothing had
    happened. Several GPUs: `torchrun --nproc-per-node 8 -m vpd_fast train ...`.
    """
    from vpd_fast.training.config import load_config

    settings = load_config(config, overrides or [])
    if dry_run:
        _dry_run(settings, step)
        return
    if output is None:
        raise InputError("-o is missing: give a folder for the run, or --dry-run to write nothing")
    from vpd_fast.training.trainer import Trainer

    trainer = Trainer(settings, output, resume=resume, sentences=_sentences(settings))
    summary = trainer.run()
    if trainer.processes.first:
        typer.echo(_report(summary, output, settings))
    if summary.stopped:
        raise typer.Exit(STOPPED)


def _sentences(settings: TrainConfig) -> Any:
    """Return what makes random tokens for a model with random weights and no encoder named: it needs no CLIP."""
    if not TASKS[settings.task].takes_text or settings.init.random is None or settings.init.text_encoder is not None:
        return None
    from vpd_fast.cli.options import random_tokens
    from vpd_fast.config import VPDConfig

    config = VPDConfig.from_dict({"task": settings.task, **settings.model})
    return lambda sentences: random_tokens(list(sentences), config.tokens, config.backbone.context_dim)


def _report(summary: Summary, output: Path, settings: TrainConfig) -> str:
    skipped = f", {summary.skipped_steps} of them skipped as not finite" if summary.skipped_steps else ""
    lines = []
    if summary.stopped:
        stopped = f"stopped at step {summary.step} of {summary.steps}"
        if summary.last is None:
            lines.append(f"{stopped}; there is no checkpoint yet, so nothing of it is kept")
        else:
            lines.append(f"{stopped}; --resume auto -o {output} goes on from {summary.last.name}")
    else:
        lines.append(f"{summary.step} steps done{skipped}")
    if summary.best is not None and summary.metric is not None:
        name, value = summary.metric
        lines.append(f"best model: {summary.best} ({name} {value:.4f})")
    model = summary.best or summary.last
    if model is not None:
        text = ' --text "what to look for"' if TASKS[settings.task].takes_text else ""
        lines.append(f"to use it: vpd-fast predict IMAGE --checkpoint {model}{text}")
    return "\n".join(lines)


def _dry_run(settings: TrainConfig, step: bool) -> None:
    from vpd_fast.training.trainer import Trainer

    trainer = Trainer(settings, None, sentences=_sentences(settings))
    if trainer.processes.first:
        typer.echo(_plan(trainer, settings))
    if step:
        loss = trainer.try_batch()
        if trainer.processes.first:
            typer.echo(f"one batch forward and backward: loss {loss:.4f}")


def _plan(trainer: Trainer, settings: TrainConfig) -> str:
    from vpd_fast.data.survey import survey
    from vpd_fast.training.memory import estimate_memory

    count = trainer.processes.count
    lines = [f"note: {note}" for note in trainer.notes]
    targets = survey(trainer.train_data, trainer.model.config.max_depth)
    lines += [f"note: training data: {note}" for note in targets]
    lines.append(
        f"{settings.task}: {len(trainer.train_data)} samples to train on, "
        + (f"{len(trainer.val_data)} to evaluate on" if trainer.val_data is not None else "none to evaluate on")
    )
    images = settings.batch_size * settings.accumulation * count
    lines.append(
        f"{trainer.steps} steps of {images} images ({count} processes x {settings.accumulation} x "
        f"{settings.batch_size}), {trainer.steps * images / len(trainer.train_data):.1f} epochs"
    )
    first, last = (trainer.schedule(i) for i in (0, trainer.steps - 1))
    lines.append(f"schedule {settings.schedule.name}, groups of parameters (lr at the first and the last step):")
    for group in trainer.optimizer.param_groups:
        size = sum(p.numel() for p in group["params"])
        rate = group["initial_lr"]
        lines.append(
            f"  {group.get('name', ''):<24} {size / 1e6:9.3f} M  lr {rate * first:.3g} to {rate * last:.3g}  "
            f"weight decay {group['weight_decay']:g}"
        )
    memory = estimate_memory(
        trainer.model.config, batch_size=settings.batch_size, size=settings.data.size, precision=trainer.precision,
        attention_backend=settings.attention_backend, checkpointing=settings.checkpointing,
        encoder=settings.encoder.precision, amsgrad=settings.optimizer.amsgrad,
    )  # fmt: skip
    lines.append(f"memory of a step, estimated: {memory['total'] / GIB:.2f} GiB")
    lines += [f"  {name:<12} {value / GIB:7.2f} GiB" for name, value in memory.items() if name != "total"]
    return "\n".join(lines)
