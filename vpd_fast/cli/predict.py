"""`vpd-fast predict`: labels, masks or depth for images."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vpd_fast.cli import at_scale, files, options, running
from vpd_fast.errors import ImageError, InputError

if TYPE_CHECKING:
    import numpy as np

    from vpd_fast.inference import Result


def predict(
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="IMAGES", help="Files, folders (the images in them) and quoted globs."),
    ] = None,
    checkpoint: options.Checkpoint = None,
    random_weights: options.RandomWeights = None,
    task: options.Task = None,
    config: options.Config = None,
    mode: options.Mode = None,
    scales: Annotated[
        str | None,
        typer.Option(
            metavar="S,S,...",
            help="Average over these relative sizes. [default: 1]",
            rich_help_panel=options.SEGMENTATION,
        ),
    ] = None,
    text: options.Text = None,
    text_encoder: options.TextEncoderName = None,
    scene: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|NUMBER",
            help="One of the model's; without it their mean is used.",
            rich_help_panel=options.DEPTH,
        ),
    ] = None,
    flip: Annotated[
        bool | None,
        typer.Option(
            "--flip/--no-flip",
            help="Average with the mirror image. [default: yes for depth, no for segmentation]",
            rich_help_panel=options.RUNNING,
        ),
    ] = None,
    probabilities: Annotated[
        bool,
        typer.Option(
            "--probabilities",
            help="Write them too, as .npy: float32, (classes or sentences, H, W).",
            rich_help_panel=options.RUNNING,
        ),
    ] = False,
    output: options.Output = Path("vpd_results"),
    device: options.Device = "cpu",
    precision: options.Precision = None,
    attention_backend: options.AttentionBackend = "plain",
    json: options.Json = False,
    list_file: Annotated[
        str | None,
        typer.Option(
            "--list",
            metavar="FILE",
            help="Images as lines of a file, - for standard input.",
            rich_help_panel=options.AT_SCALE,
        ),
    ] = None,
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Subfolders, too.", rich_help_panel=options.AT_SCALE)
    ] = False,
    root: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Results keep the folders below it. [default: the only folder given, else the current one]",
            rich_help_panel=options.AT_SCALE,
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Only every N-th image, from the I-th on. [default: torchrun's rank]",
            rich_help_panel=options.AT_SCALE,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Leave out what the folder's records say is done.", rich_help_panel=options.AT_SCALE
        ),
    ] = False,
    prefetch: Annotated[
        int | None,
        typer.Option(metavar="N", help="Read and write N images ahead. [default: 4]", rich_help_panel=options.AT_SCALE),
    ] = None,
) -> None:
    """Predict on images, and write pictures and a results.json.

    An image cat.jpg gives

    - cat.png: segmentation's labels as a palette, depth in millimetres with 16 bits, or the mask of a sentence
      (cat_1.png, cat_2.png, ... if there are several)

    - cat_overlay.png: a picture to look at

    Broken images do not stop a run: they are reported at the end, and the exit code is 1.

    With an option of the last panel, or under torchrun, a run may have any number of images: results-*.jsonl gets a
    line per image at once, failed-*.txt the broken ones, and a/cat.jpg gives a/cat.jpg.png, a/cat.jpg_overlay.png.
    """
    scale = _at_scale(list_file, recursive, root, shard, resume, prefetch)
    if not images and list_file is None:
        raise InputError("Missing argument 'IMAGES...': give images, folders or globs, or --list FILE")
    if scale is not None:
        device = scale.local_device(device)
    model_options = options.ModelOptions(checkpoint, random_weights, task, config, device, precision, attention_backend)
    chosen: dict[str, Any] = {"mode": mode, "flip": flip, "scene": scene}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if scales is not None:
        chosen["scales"] = options.scales_of(scales)
    if probabilities:
        chosen["probabilities"] = True
    if scale is None:
        paths = files.collect_images(images)
        masks = [f"_{i}.png" for i in range(1, len(text or []) + 1)]
        stems = files.output_stems(paths, output, [".png", "_overlay.png", "_probabilities.npy", *masks])
        files.prepare_output(output)
    else:
        at_scale.check_output(output, images or ())
        listing = scale.images(images or [])  # what is misspelt is said before the model is loaded

    with running.error_console().status("loading the model"):
        model = model_options.load()
        chosen |= options.text_options(model, text, text_encoder, random_weights)
        from vpd_fast.inference import make_predictor

        predictor = make_predictor(model, **chosen)
    notes = options.notes(random_weights, chosen)
    header = model_options.header(model, notes)
    write = partial(_write, output)
    if scale is None:
        running.run_images(paths, stems, predictor, write, header, output / "results.json", json)
    else:
        told = {name: value for name, value in chosen.items() if name not in ("tokens", "text_encoder")}
        header |= {"options": told | ({"text_encoder": text_encoder} if text_encoder else {})}
        at_scale.run(scale, listing, predictor, write, header, output, json)


def _at_scale(
    list_file: str | None, recursive: bool, root: Path | None, shard: str | None, resume: bool, prefetch: int | None
) -> at_scale.AtScale | None:
    """The options of a large run, None for a small one. Raises InputError."""
    part = at_scale.Shard.from_environment() if shard is None else at_scale.Shard.parse(shard)
    given = (list_file, root, shard, prefetch)
    if not (recursive or resume or part.count > 1 or any(value is not None for value in given)):
        return None
    return at_scale.AtScale(list_file, recursive, root, part, resume, 4 if prefetch is None else prefetch)


def _write(output: Path, result: Result, stem: str) -> running.Record:
    """Write a result's files and tell what is in them."""
    from vpd_fast.inference import save_png

    folder = (output / stem).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageError(f"{folder}: cannot make the folder ({error.strerror or error})") from error
    written = result.save(output / f"{stem}.png")
    written.append(save_png(result.overlay(), output / f"{stem}_overlay.png"))
    probabilities = getattr(result, "probabilities", None)
    if probabilities is not None:
        path = output / f"{stem}_probabilities.npy"
        written.append(files.write_file(path, partial(_save_array, probabilities)))
    return {**_content(result), "files": [path.relative_to(output).as_posix() for path in written]}


def _save_array(array: np.ndarray, path: Path) -> None:
    import numpy as np

    with path.open("wb") as file:  # given a name, numpy would append ".npy" to it
        np.save(file, array)


def _content(result: Result) -> running.Record:
    from vpd_fast.inference import DepthResult, SegmentationResult

    if isinstance(result, SegmentationResult):
        return {
            "classes": [
                {"name": name, "label": result.class_names.index(name), "percent": round(100 * share, 3)}
                for name, share in result.shares().items()
            ]
        }
    if isinstance(result, DepthResult):
        depth = result.depth
        return {"metres": {"min": float(depth.min()), "mean": float(depth.mean()), "max": float(depth.max())}}
    return {
        "masks": [
            {"text": sentence, "pixels": int(mask.sum()), "percent": round(100 * float(mask.mean()), 3)}
            for sentence, mask in zip(result.sentences, result.masks, strict=True)
        ]
    }
