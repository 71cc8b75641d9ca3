"""`vpd-fast maps`: where the network attends for each class or word."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vpd_fast.cli import files, options, running
from vpd_fast.errors import ImageError, InputError
from vpd_fast.labels import default_names, find_name

if TYPE_CHECKING:
    from vpd_fast.inference import AttentionMaps, Result
    from vpd_fast.models import VPD


def maps(
    images: options.Images,
    checkpoint: options.Checkpoint = None,
    random_weights: options.RandomWeights = None,
    task: options.Task = None,
    config: options.Config = None,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,...", help="These instead of the strongest ones.", rich_help_panel=options.SEGMENTATION
        ),
    ] = None,
    top: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="How many of the strongest to draw.", rich_help_panel=options.SEGMENTATION
        ),
    ] = 8,
    mode: options.Mode = None,
    text: options.Text = None,
    text_encoder: options.TextEncoderName = None,
    separate: Annotated[
        bool,
        typer.Option(
            "--separate", help="Also write each map alone, into the folder cat_maps.", rich_help_panel=options.RUNNING
        ),
    ] = False,
    output: options.Output = Path("vpd_results"),
    device: options.Device = "cpu",
    precision: options.Precision = None,
    attention_backend: options.AttentionBackend = "plain",
    json: options.Json = False,
) -> None:
    """Draw where the network attends for each class, or for each word of a sentence.

    An image cat.jpg gives cat_maps.png, a grid of heat maps: of the classes with the largest mean attention, or of a
    sentence's words (cat_maps_1.png, cat_maps_2.png, ... if there are several sentences). maps.json has the numbers.
    """
    model_options = options.ModelOptions(checkpoint, random_weights, task, config, device, precision, attention_backend)
    paths = files.collect_images(images)
    several = [f"_maps_{i}{end}" for i in range(1, len(text or []) + 1) for end in (".png", "")]
    stems = files.output_stems(paths, output, ["_maps.png", "_maps", *several])
    files.prepare_output(output)

    with running.error_console().status("loading the model"):
        model = model_options.load()
        chosen = _find_classes(model, classes)
        predictor_options: dict[str, Any] = {"with_maps": True} | ({} if mode is None else {"mode": mode})
        predictor_options |= options.text_options(model, text, text_encoder, random_weights)
        from vpd_fast.inference import make_predictor

        predictor = make_predictor(model, **predictor_options)
    notes = options.notes(random_weights, predictor_options)
    header = model_options.header(model, notes)
    write = partial(_write, output, chosen, top, separate)
    running.run_images(paths, stems, predictor, write, header, output / "maps.json", json)


def _find_classes(model: VPD, classes: str | None) -> list[int] | None:
    """Numbers of the classes asked for. Raises InputError for a model without maps and for unknown classes."""
    config = model.config
    if config.task == "depth":
        raise InputError(
            "depth models have no maps: their context is a single token, which every pixel attends to fully"
        )
    if not config.use_attn or not any("cross" in source for source in config.map_sources):
        raise InputError(
            "this model has no cross-attention maps "
            f"(use_attn={config.use_attn}, attn_selector={config.attn_selector!r})"
        )
    if classes is None:
        return None
    if config.task != "segmentation":
        raise InputError(f"--classes is for segmentation models, this is a {config.task} model")
    return [find_name(name, default_names(config)) for name in classes.split(",")]


def _write(
    output: Path, chosen: list[int] | None, top: int, separate: bool, result: Result, stem: str
) -> running.Record:
    """Write a result's maps and tell what is in them."""
    from vpd_fast.inference import SegmentationResult

    if isinstance(result, SegmentationResult):
        keys = result.maps.strongest(top) if chosen is None else [result.maps.names[i] for i in chosen]
        drawn, written = _draw(result, result.maps, keys, output / f"{stem}_maps.png", separate)
        return {"maps": drawn, "files": written}
    sentences, all_written = [], []
    for i, (sentence, maps) in enumerate(zip(result.sentences, result.maps, strict=True), 1):
        name = f"{stem}_maps.png" if len(result.maps) == 1 else f"{stem}_maps_{i}.png"
        drawn, written = _draw(result, maps, _words(maps, top), output / name, separate)
        sentences.append({"text": sentence, "maps": drawn})
        all_written += written
    return {"sentences": sentences, "files": all_written}


def _words(maps: AttentionMaps, top: int) -> list[str | int]:
    """The sentence's words in order, without start, end and padding; the strongest tokens where words are not known."""
    marks = ("<start>", "<end>", "<pad>")
    words = [name for name in maps.names if isinstance(name, str) and not name.startswith(marks)]
    return words or maps.strongest(top)


def _draw(
    result: Result, maps: AttentionMaps, keys: list[str | int], path: Path, separate: bool
) -> tuple[list[running.Record], list[str]]:
    """Write the grid and, if asked for, single maps. Returns a record per map, and the files' names."""
    from vpd_fast.inference import heatmap_grid, heatmap_overlay, save_png

    save_png(heatmap_grid(result.image, maps, keys), path)
    written = [path.name]
    folder = path.with_suffix("")
    if separate:
        _make_folder(folder)
    drawn = []
    for key in keys:
        heat = maps[key]
        drawn.append({"name": key, "mean": float(heat.mean()), "max": float(heat.max())})
        if separate:
            number = maps.names.index(key)
            single = folder / f"{number:03d}_{re.sub('[^0-9A-Za-z-]+', '_', str(key))}.png"
            save_png(heatmap_overlay(result.image, heat, title=str(key)), single)
            written.append(f"{folder.name}/{single.name}")
    return drawn, written


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ImageError(f"{folder}: cannot make the folder ({error.strerror or error})") from error
