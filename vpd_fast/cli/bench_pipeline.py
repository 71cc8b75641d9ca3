"""`vpd-fast bench pipeline`: what surrounds the model, from files to files."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import typer

from vpd_fast.cli import files, options
from vpd_fast.config import BackboneConfig, VPDConfig
from vpd_fast.errors import ImageError, InputError
from vpd_fast.files import write_files, write_json
from vpd_fast.inference import DepthResult, SegmentationResult, make_predictor
from vpd_fast.inference.results import Result, save_picture
from vpd_fast.labels import ADE20K_CLASSES
from vpd_fast.models import VPD
from vpd_fast.pictures.reading import read_image
from vpd_fast.progress import ProgressBar
from vpd_fast.tasks import TASKS

OVERLAYS = ("none", "jpg")
# Of a model whose preparation of images is real, and of which nothing else is computed.
LEAST = BackboneConfig(model_channels=32, context_dim=32, num_heads=4, num_res_blocks=1, vae_ch=32)
measuring_option, output_option = options.in_panel("Measuring"), options.in_panel("Output")


def pipeline(
    checkpoint: options.Checkpoint = None,
    random_weights: options.RandomWeights = None,
    task: options.Task = None,
    config: options.Config = None,
    precision: options.Precision = None,
    device: options.Device = "cpu",
    device_ms: Annotated[
        str, measuring_option(metavar="MS,...", help="Milliseconds that a stand-in for a device takes for an image.")
    ] = "0,2,4,8",
    photo: Annotated[
        Path | None, measuring_option(metavar="FILE", help="What is copied. [default: a picture of 640x480 as JPEG]")
    ] = None,
    images: Annotated[int, measuring_option(min=10, help="Copies of it in a run.")] = 300,
    batch_size: Annotated[int, measuring_option(min=1, help="Images, windows or sentences per forward.")] = 8,
    streams: options.Streams = None,
    rounds: Annotated[int, measuring_option(min=1, help="Runs of each kind; the one of the median speed counts.")] = 3,
    json: Annotated[Path | None, output_option(metavar="FILE", help="Write all numbers there.")] = None,
    chart: Annotated[Path | None, output_option(metavar="FILE", help="Draw them there, as PNG.")] = None,
) -> None:
    """Measure images per second from files to files, and what each stage around the model costs a core.

    Copies of a photo become labels or depths, without and with overlays, as `vpd-fast predict` makes them. In place of
    the model stands a device that takes so many milliseconds (--device-ms), so that a table says how many cores feed a
    GPU. With --checkpoint or --random-weights a model runs instead, and is compared with its own speed.

    Core-ms are processor time of the whole process per image. Whether memory grows during a run is in the last column:
    try --images 5000.
    """
    from vpd_fast.bench import pipeline as measuring
    from vpd_fast.bench.environment import device_name

    modelled = checkpoint is not None or random_weights is not None
    if not modelled and (config is not None or precision is not None or streams is not None or device != "cpu"):
        raise InputError(
            "--config, --precision, --device and --streams are for a model: give --checkpoint or --random-weights"
        )
    times = _milliseconds(device_ms)
    files.check_output_file("--json", json, ".json")
    files.check_output_file("--chart", chart, ".png")
    model_options = (
        options.ModelOptions(checkpoint, random_weights, task, config, device, precision) if modelled else None
    )
    with tempfile.TemporaryDirectory(prefix="vpd-fast-bench-") as scratch:
        path = _photo(photo, Path(scratch))
        if model_options is None:
            predictor, answer, about = _stand_in(task or "segmentation", path, batch_size)
            devices = [measuring.StandIn(predictor, answer, milliseconds) for milliseconds in times]
            alone = None
        else:
            predictor, answer, about = _model(model_options, path, {"batch_size": batch_size, "streams": streams})
            devices, alone = [predictor], measuring.model_alone(predictor, read_image(path))[0]
        with ProgressBar(len(devices) * len(OVERLAYS) * rounds) as bar:
            runs = measuring.median_runs(devices, path, OVERLAYS, images, rounds, lambda: bar.update(advance=1))
        by_stage = measuring.stages(predictor, answer, path)
        if alone is not None:
            alone = (alone + measuring.model_alone(predictor, read_image(path))[0]) / 2
    cores = f"{len(os.sched_getaffinity(0))} cores, batch {batch_size}, {images} images"
    footer = f"{about['task']}, {device_name(device.partition(':')[0])}, {cores}"
    typer.echo(measuring.table(runs, by_stage))
    typer.echo(f"\n{footer}; load {os.getloadavg()[0]:.1f} at the end")
    if alone is not None:
        shares = ", ".join(f"{run.images_per_second / alone:.2f} with overlay {run.overlay}" for run in runs)
        typer.echo(f"the model alone: {alone:.1f} images/s; of that from files to files: {shares}")
    if json is not None:
        values = measuring.numbers(runs, by_stage, {**about, "about": footer, "model_images_per_second": alone})
        write_files({json: partial(write_json, values=values)}, ImageError)
    if chart is not None:
        from vpd_fast.bench import plots

        figure = measuring.chart(runs, by_stage, footer, alone)
        write_files({chart: lambda path: plots.save(figure, path)}, ImageError)


def _milliseconds(text: str) -> list[float]:
    """Parse --device-ms. Raises InputError."""
    try:
        times = [float(part) for part in text.split(",")]
    except ValueError:
        times = []
    if not times or any(not 0 <= ms < 1e6 for ms in times):
        raise InputError(f"--device-ms must be milliseconds separated by commas, like 0,2.5, got {text!r}")
    return times


def _photo(photo: Path | None, scratch: Path) -> Path:
    """Return the file that is copied: the given one, which can be read, or a picture with the detail of a photo."""
    from PIL import Image

    from vpd_fast.bench.pipeline import scene

    if photo is None:
        return save_picture(Image.fromarray(scene(len(ADE20K_CLASSES))[0]), scratch / "photo.jpg")
    read_image(photo)
    return photo


def _stand_in(task: str, path: Path, batch_size: int) -> tuple[Any, Result, dict[str, Any]]:
    """Return a predictor that only prepares images, a result that looks like one, and what is measured."""
    from vpd_fast.bench.pipeline import MAX_DEPTH, scene

    if task not in ("segmentation", "depth"):
        raise InputError(f"--task must be segmentation or depth where no model runs, got {task!r}")
    model = VPD.empty(VPDConfig(task=task, num_classes=len(ADE20K_CLASSES), channels=32, backbone=LEAST))
    predictor = make_predictor(model.to_empty(device="cpu"), batch_size=batch_size)
    image = read_image(path)
    _, labels, depth = (cv2.resize(a, image.shape[1::-1], interpolation=cv2.INTER_NEAREST) for a in scene(150))
    answer: Result = (
        SegmentationResult(image, labels.astype(np.int64), ADE20K_CLASSES)
        if task == "segmentation"
        else DepthResult(image, depth, MAX_DEPTH)
    )
    return predictor, answer, {"task": task}


def _model(
    model_options: options.ModelOptions, path: Path, chosen: dict[str, Any]
) -> tuple[Any, Result, dict[str, Any]]:
    """Return a model's predictor, its result for the photo, and what is measured."""
    model = model_options.load()
    if TASKS[model.config.task].takes_text:
        raise InputError("this measures segmentation and depth: a referring model needs sentences")
    predictor = options.make_noting_predictor(model, chosen)
    return predictor, predictor(read_image(path)), model_options.header(model, [])
