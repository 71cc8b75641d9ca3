"""`vpd-fast predict`: labels, masks or depth for images."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from vpd_fast.cli import files, options, running, tar_shards, video
from vpd_fast.errors import ImageError, InputError
from vpd_fast.files import write_files
from vpd_fast.inference import Result
from vpd_fast.inference.listing import Listing, Naming, Shard
from vpd_fast.inference.records import Records, ResultsFile, Sink, recorded
from vpd_fast.inference.results import save_picture
from vpd_fast.inference.resuming import FULL, NAMES, OVERLAY, SHORT
from vpd_fast.inference.tar_shards import OUTPUTS
from vpd_fast.progress import error_console

OVERLAYS = ("jpg", "png", "none")


def predict(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGES",
            help="Files, folders (the images in them) and quoted globs; or videos; or a camera's number.",
        ),
    ] = None,
    checkpoint: options.Checkpoint = None,
    ema: options.Ema = False,
    random_weights: options.RandomWeights = None,
    task: options.Task = None,
    config: options.Config = None,
    mode: options.Mode = None,
    scales: options.Scales = None,
    text: options.Text = None,
    text_encoder: options.TextEncoderName = None,
    scene: Annotated[
        str | None,
        options.depth_option(metavar="NAME|NUMBER", help="One of the model's; without it their mean is used."),
    ] = None,
    flip: options.Flip = None,
    probabilities: Annotated[
        bool,
        options.running_option(
            "--probabilities", help="Write them too, as .npy: float32, (classes or sentences, H, W)."
        ),
    ] = False,
    batch_size: options.BatchSize = None,
    streams: options.Streams = None,
    overlay: Annotated[
        str | None,
        options.running_option(
            metavar="KIND",
            help="Of the pictures to look at: jpg, png (exact, but slow to write), or none. [default: jpg]",
        ),
    ] = None,
    every: Annotated[
        int | None, options.video_option(metavar="N", help="Only every N-th frame, which stays until the next.")
    ] = None,
    show: Annotated[bool, options.video_option("--show", help="Show a camera's pictures in a window.")] = False,
    output: options.Output = Path("vpd_results"),
    device: options.Device = "cpu",
    precision: options.Precision = None,
    attention_backend: options.AttentionBackend = "plain",
    json: options.Json = False,
    list_file: Annotated[
        str | None,
        options.at_scale_option("--list", metavar="FILE", help="Images as lines of a file, - for standard input."),
    ] = None,
    recursive: Annotated[
        bool, options.at_scale_option("--recursive", "-r", help="Subfolders, too, also linked ones; each folder once.")
    ] = False,
    root: Annotated[
        Path | None,
        options.at_scale_option(
            metavar="FOLDER",
            help="Results keep the folders below it. [default: the only folder given, else the current one, or where "
            "that does not hold all images the one that does]",
        ),
    ] = None,
    shard: Annotated[
        str | None,
        options.at_scale_option(
            metavar="I/N", help="Only every N-th image, from the I-th on. [default: torchrun's rank]"
        ),
    ] = None,
    resume: Annotated[
        bool, options.at_scale_option("--resume", help="Leave out what the folder's records say is done.")
    ] = False,
    output_format: Annotated[
        str | None,
        options.at_scale_option(metavar="FORMAT", help=f"Of tar shards' results: {', '.join(OUTPUTS)}. [default: tar]"),
    ] = None,
    upload: Annotated[
        str | None,
        options.at_scale_option(
            metavar="URL", help="Move complete shards of results there, as to s3://bucket/results; records stay here."
        ),
    ] = None,
    prefetch: Annotated[
        int | None,
        options.at_scale_option(metavar="N", help="Read and write N images ahead. [default: 4, or two batches]"),
    ] = None,
) -> None:
    """Predict on images, and write pictures and a results.json.

    An image cat.jpg gives

    - cat.png: segmentation's labels as a palette, depth in millimetres with 16 bits (or another depth_scale, levels
      per metre, that results.json has where these do not fit), or the mask of a sentence (cat_1.png, cat_2.png, ... if
      there are several)

    - cat_overlay.jpg: a picture to look at

    Images that are not all in one folder keep their folders, and like those of equal names (cat.jpg, cat.png) their
    endings: a/cat.jpg gives a/cat.jpg.png and a/cat.jpg_overlay.jpg.

    Broken images do not stop a run: they are reported at the end, and the exit code is 1.

    Tar shards 'shards/{000..099}.tar', local or on anything that fsspec reads (s3://, https://, ...), give a shard of
    results each: key.png and key.json of every image key.jpg. See --output-format and --resume.

    A video clip.mp4 gives clip_overlay.mp4, with its sound, and clip.jsonl with a line per frame; --resume goes on with
    one that was interrupted. A camera (predict 0 --show) is shown.

    With an option of the last panel, or under torchrun, a run may have any number of images: instead of results.json,
    `results*.jsonl` gets a line per image at once, and `failed*.txt` the broken ones.
    """
    if not images and list_file is None:
        raise InputError("Missing argument 'IMAGES...': give images, folders or globs, or --list FILE")
    part = Shard.from_environment() if shard is None else Shard.parse(shard)
    given = (list_file, root, shard, prefetch)
    at_scale = recursive or resume or part.count > 1 or any(value is not None for value in given)
    if overlay not in (None, *OVERLAYS):
        raise InputError(f"--overlay must be one of {', '.join(OVERLAYS)}, got {overlay!r}")
    if prefetch is not None and prefetch < 1:
        raise InputError(f"--prefetch must be at least 1, got {prefetch}")
    if at_scale and device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun started several processes here
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    camera, videos = video.camera_of(images or []), video.videos_of(images or [])
    moving = camera is not None or bool(videos)
    if moving and (any(value is not None for value in (*given, overlay)) or recursive or probabilities):
        raise InputError("videos take neither --overlay, --probabilities nor the options for many images but --resume")
    if show != (camera is not None):
        raise InputError("--show is for a camera: give its number, as in predict 0 --show")
    tars = tar_shards.shards_of(images or [])
    if tars and (recursive or probabilities or list_file or root):
        raise InputError("tar shards take neither --probabilities nor --list, --recursive or --root")
    if output_format not in (None, *OUTPUTS) or (output_format and not tars):
        raise InputError(f"--output-format is for tar shards, {' or '.join(OUTPUTS)}, got {output_format!r}")
    if upload is not None:
        if not tars:
            raise InputError(f"--upload is for the results of tar shards, got {upload!r}")
        tar_shards.check_upload(upload)
    if every is not None and (not videos or every < 1):
        raise InputError(f"--every is for videos, at least 1, got {every}")
    model_options = options.ModelOptions(
        checkpoint, random_weights, task, config, device, precision, attention_backend, ema
    )
    chosen: dict[str, Any] = {"mode": mode, "flip": flip, "scene": scene, "streams": streams}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if scales is not None:
        chosen["scales"] = options.scales_of(scales)
    if probabilities:
        chosen["probabilities"] = True
    together = options.batch_size_of(batch_size)
    if moving or tars:
        with error_console().status("loading the model"):
            model = model_options.load()
            chosen |= options.text_options(model, text, text_encoder, random_weights)
            predictor = options.make_noting_predictor(model, {**chosen, "batch_size": together})
        if camera is not None:
            video.show(camera, predictor)
            return
        notes = options.notes(random_weights, chosen.get("text_encoder")) + predictor.notes
        header = model_options.header(model, notes)
        shown = {name: value for name, value in chosen.items() if name != "text_encoder"}
        header["options"] = shown | ({"text_encoder": text_encoder} if text_encoder else {})
        files.prepare_output(output)
        if videos:
            video.run(videos, predictor, output, header, every=every or 1, resume=resume, print_json=json)
            return
        tar_shards.run(
            tars, part, predictor, output, {**header, "device": header["device"].partition(":")[0]},
            to=output_format or OUTPUTS[0], overlay=overlay or "none", upload=upload, resume=resume,
            prefetch=prefetch or max(8, 2 * predictor.batch_size), print_json=json,
        )  # fmt: skip
        return
    listing = Listing(images or [], list_file, recursive, root, at_scale)
    masks = [f"_{i}" for i in range(1, len(text or []) + 1)]
    # What is misspelt is said before the model is loaded.
    naming = listing.naming(["_overlay", *masks])
    before = recorded(output) if resume else {}
    if before.get(NAMES) == FULL:
        naming = replace(naming, short=False)  # as the run began
    pictures: str = overlay or before.get(OVERLAY, OVERLAYS[0])
    if at_scale:
        files.check_output(output, images or [], naming.folder if naming.short else None)
    else:
        paths = list(listing.paths())
        suffixes = [".png", f"_overlay.{pictures}", "_probabilities.npy", *(f"{mask}.png" for mask in masks)]
        files.check_not_overwritten(output, map(naming.stem, paths), suffixes, paths)
    files.prepare_output(output)

    with error_console().status("loading the model"):
        model = model_options.load()
        chosen |= options.text_options(model, text, text_encoder, random_weights)
        predictor = options.make_noting_predictor(model, {**chosen, "batch_size": together})
    notes = options.notes(random_weights, chosen.get("text_encoder")) + predictor.notes
    header = model_options.header(model, notes)
    if at_scale:
        shown = {name: value for name, value in chosen.items() if name != "text_encoder"}
        header["options"] = shown | ({"text_encoder": text_encoder} if text_encoder else {})
        header |= {NAMES: SHORT if naming.short else FULL, OVERLAY: pictures}
        kept = {**header, "device": header["device"].partition(":")[0]}  # whichever GPU a process has
        sink: Sink = Records(output, part, kept, resume)
    else:
        footer = partial(running.peak_memory, header["device"])
        sink = ResultsFile(output / "results.json", header, only=naming.total == 1, footer=footer)
    total = None if naming.total is None else len(range(part.index, naming.total, part.count))
    write = partial(_write, output, naming, pictures)
    running.run(
        listing.images(naming, part), total, predictor, write,
        sink, header, prefetch=prefetch or max(4, 2 * predictor.batch_size), print_json=json,
        label="" if part.count == 1 else f"shard {part.index}/{part.count}",
    )  # fmt: skip


def _write(output: Path, naming: Naming, overlay: str, result: Result, name: str) -> running.Record:
    """Write the files of an image's result, the overlay of that kind. Returns what is in them, and their names."""
    stem = naming.stem(name)
    files.make_folder((output / stem).parent)
    written = result.save(output / f"{stem}.png")
    if overlay != "none":
        written.append(save_picture(result.overlay(), output / f"{stem}_overlay.{overlay}"))
    probabilities = getattr(result, "probabilities", None)  # depth has none
    if probabilities is not None:
        path = output / f"{stem}_probabilities.npy"
        write_files({path: partial(_save_array, probabilities)}, ImageError)
        written.append(path)
    return {**result.record(), "files": [path.relative_to(output).as_posix() for path in written]}


def _save_array(array: np.ndarray, path: Path) -> None:
    with path.open("wb") as file:  # given a name, numpy would append ".npy" to it
        np.save(file, array)
