"""`vpd-fast evaluate`: the metrics of a model on a data set, tables, and the worst cases."""

from __future__ import annotations

import json as json_module
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import distributed

from vpd_fast.cli import files, options, running
from vpd_fast.data import ANY_TASK, Dataset, open_dataset
from vpd_fast.errors import InputError, ModelError
from vpd_fast.evaluation import Evaluation
from vpd_fast.evaluation import evaluate as run
from vpd_fast.evaluation.results import show
from vpd_fast.pictures.decoding import printable
from vpd_fast.progress import error_console

# Kinds of vpd_fast.data, and the split that results are published for.
SPLITS = {
    "ade20k": "validation", "refcoco": "val", "refcoco+": "val", "refcocog": "val", "refclef": "val", "nyu": "test",
    "folder": "val",
    "shapes": "test",
}  # fmt: skip
SHOWN_CLASSES = 10  # best and worst
data_option = options.in_panel("Data")


def evaluate(
    data: Annotated[str, data_option(metavar="KIND", help=f"{', '.join(SPLITS)}.")],
    root: Annotated[Path, data_option(metavar="FOLDER", help="Where the data set lies.")],
    split: Annotated[
        str | None,
        data_option(
            metavar="NAME", help="[default: validation for ade20k, test for nyu and shapes, val for the others]"
        ),
    ] = None,
    data_options: Annotated[
        list[str] | None,
        data_option(
            "--data-option",
            metavar="NAME=VALUE",
            help="An option of the data set, may be repeated: binary=true (masks of 0 and 255), depth_scale=256, "
            "exif=false, ...",
        ),
    ] = None,
    limit: Annotated[int | None, data_option(metavar="N", help="Only the first N samples.")] = None,
    strict: Annotated[bool, data_option("--strict", help="Stop at the first broken sample.")] = False,
    checkpoint: options.Checkpoint = None,
    ema: options.Ema = False,
    random_weights: options.RandomWeights = None,
    task: options.Task = None,
    config: options.Config = None,
    mode: options.Mode = None,
    scales: options.Scales = None,
    text_encoder: options.TextEncoderName = None,
    resolution: Annotated[
        str | None,
        options.referring_option(
            metavar="NAME",
            help="Compare masks at the model's size (resized, as published, the default) or at the image's (original).",
        ),
    ] = None,
    split_by: Annotated[
        str | None, options.referring_option(metavar="NAME", help="Who split it: unc, umd, google.")
    ] = None,
    crop: Annotated[
        str | None,
        options.depth_option(
            metavar="NAME",
            help="What is measured: eigen (of 480x640 images), garg, kitti_eigen, none. [default: eigen for nyu]",
        ),
    ] = None,
    shift_window: Annotated[
        bool | None,
        options.depth_option(
            "--shift-window/--whole",
            help="Square windows along the long side, or the image as a whole. [default: windows]",
        ),
    ] = None,
    scene_rule: Annotated[
        str | None, options.depth_option(metavar="RULE", help="nyu's scenes: substring (as published) or fixed.")
    ] = None,
    filenames: Annotated[
        Path | None,
        options.depth_option(
            metavar="FILE", help="nyu's list of images and depths as published. [default: all in the folder]"
        ),
    ] = None,
    flip: options.Flip = None,
    output: options.Output = Path("vpd_evaluation"),
    worst: Annotated[int, options.running_option(metavar="N", help="Draw the N worst cases.")] = 24,
    batch_size: options.BatchSize = None,
    streams: options.Streams = None,
    workers: Annotated[int, options.running_option(metavar="N", help="Threads that read ahead.")] = 2,
    device: options.Device = "cpu",
    precision: options.Precision = None,
    attention_backend: options.AttentionBackend = "plain",
    json: options.Json = False,
) -> None:
    """Measure a model on a data set.

    Writes metrics.json, per_image.csv, per_class.csv (segmentation), and the worst cases as worst.html and worst.png.

    The defaults are the published evaluation at a single scale. Under torchrun each process measures a part; the
    results are those of one process.

    Broken samples do not stop a run: they are reported at the end, and the exit code is 1.
    """
    if data not in SPLITS:
        raise InputError(f"--data must be one of {', '.join(SPLITS)}, got {data!r}")
    chosen = {
        "mode": mode, "scales": None if scales is None else options.scales_of(scales), "flip": flip,
        "resolution": resolution, "shift_window": shift_window, "crop": crop, "streams": streams,
    }  # fmt: skip
    if data in ANY_TASK and crop is None:
        chosen["crop"] = "none"
    together = options.batch_size_of(batch_size)
    split = SPLITS[data] if split is None else split
    dataset_options = _data_options(data, split_by, scene_rule, filenames, data_options or [])
    with _process_group(device) as (rank, world_size, device):
        # A data set of a known task is opened before the model, which may take minutes to load.
        dataset = None if data in ANY_TASK and task is None else _open(data, root, split, task, dataset_options)
        if task is None and dataset is not None and random_weights is not None and config is None:
            task = dataset.task
        model_options = options.ModelOptions(
            checkpoint, random_weights, task, config, device, precision, attention_backend, ema
        )
        if rank == 0:
            files.prepare_output(output)
        with error_console().status("loading the model"):
            model = model_options.load()
        if dataset is None:
            dataset = _open(data, root, split, model.config.task, dataset_options)
        if model.config.task != "depth" and crop is None:
            del chosen["crop"]  # a default, which other tasks do not know
        chosen = {name: value for name, value in chosen.items() if value is not None}
        encoder = options.text_encoder(model, text_encoder, random_weights)
        try:
            with options.truncation_noted():
                found = run(
                    model, dataset, limit=limit, batch_size=together, progress=rank == 0, rank=rank,
                    world_size=world_size, text_encoder=encoder, strict=strict, workers=workers, worst=worst, **chosen,
                )  # fmt: skip
        except ModelError:
            typer.echo("stopped: nothing is written, as the metrics are of all samples", err=True)
            raise
        if rank == 0:
            header = model_options.header(model, options.notes(random_weights, encoder) + found.notes)
            about = {"kind": data, "root": str(root), "split": split, "samples": len(dataset)}
            header["data"] = {**about, **dataset_options}
            header["processes"] = world_size
            _finish(found, header, output, json)
        if world_size > 1:  # a process that leaves with exit code 1 makes torchrun end the others
            distributed.barrier()
    if rank == 0 and found.failed:
        raise typer.Exit(1)


def _data_options(
    data: str, split_by: str | None, scene_rule: str | None, filenames: Path | None, others: list[str]
) -> dict[str, Any]:
    """Return the options given that the data set has. Raises InputError for those it does not have.

    others: NAME=VALUE, where VALUE is JSON, or else text.
    """
    given = {
        "split_by": (split_by, data.startswith("ref")), "scene_rule": (scene_rule, data == "nyu"),
        "filenames": (None if filenames is None else str(filenames), data == "nyu"),
    }  # fmt: skip
    for name, (value, fits) in given.items():
        if value is not None and not fits:
            raise InputError(f"--{name.replace('_', '-')} is not for --data {data}")
    chosen = {name: value for name, (value, _) in given.items() if value is not None}
    for text in others:
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise InputError(f"--data-option must be NAME=VALUE, got {text!r}")
        try:
            chosen[name] = json_module.loads(value)
        except ValueError:
            chosen[name] = value
    return chosen


def _open(kind: str, root: Path, split: str, task: str | None, chosen: dict[str, Any]) -> Dataset:
    return open_dataset(kind, root, split, **({"task": task} if kind in ANY_TASK else {}), **chosen)


@contextmanager
def _process_group(device: str) -> Iterator[tuple[int, int, str]]:
    """Yield (rank, processes, device of this process), with torch.distributed initialised under torchrun."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 or "RANK" not in os.environ:
        yield 0, 1, device
        return
    gpu = device.startswith("cuda")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if gpu else "gloo")
    try:
        yield distributed.get_rank(), distributed.get_world_size(), device
    finally:
        distributed.destroy_process_group()


def _finish(found: Evaluation, header: dict[str, Any], output: Path, print_json: bool) -> None:
    """Write the files, print the results."""
    header |= running.peak_memory(header["device"])
    notes = header.pop("notes")
    found.notes = notes
    found.save(output, header)
    for row in found.failed:
        typer.echo(f"failed: {row['name']}: {row['error']}", err=True)
    if print_json:
        typer.echo(json_module.dumps({**header, **found.summary()}, indent=2))
        return
    for note in notes:
        typer.echo(f"note: {note}")
    _print_tables(found)
    images = f"{found.count} image{'' if found.count == 1 else 's'}" + (
        f" ({len(found.failed)} failed)" if found.failed else ""
    )
    typer.echo(f"{images}, {found.seconds / max(found.count, 1):.2f} s per image; written to {printable(output)}")


def _print_tables(found: Evaluation) -> None:
    """Print the metrics, and the best and worst classes."""
    console = Console()
    classes = sorted((row for row in found.per_class if row["IoU"] is not None), key=lambda row: -row["IoU"])
    if classes:
        table = Table("class", "IoU", "accuracy", "pixels", title="classes by IoU")
        for column in table.columns[1:]:
            column.justify = "right"
        hidden = len(classes) - 2 * SHOWN_CLASSES
        shown = classes if hidden <= 0 else [*classes[:SHOWN_CLASSES], None, *classes[-SHOWN_CLASSES:]]
        for row in shown:
            if row is None:
                table.add_row(f"... {hidden} more", "", "", "")
            else:
                values = (show("IoU", row["IoU"]), show("accuracy", row["accuracy"]), f"{row['pixels']:,}")
                table.add_row(escape(row["class"]), *values)
        console.print(table)
    table = Table("metric", "value")
    table.columns[1].justify = "right"
    for name, value in found.metrics.items():
        table.add_row(name, show(name, value))
    console.print(table)
