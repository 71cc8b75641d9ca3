"""`vpd-fast maps`: where the network attends for each class or word."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from vpd_fast.cli import files, options, running
from vpd_fast.errors import InputError
from vpd_fast.inference import AttentionMaps, Result, heatmap_grid, heatmap_overlay, save_png
from vpd_fast.inference.listing import Listing, Naming, Shard
from vpd_fast.inference.records import ResultsFile
from vpd_fast.labels import default_names, find_name
from vpd_fast.progress import error_console

if TYPE_CHECKING:
    from vpd_fast.models.perceiver import Perceiver


def maps(
    images: options.Images,
    checkpoint: options.Checkpoint = None,
    ema: options.Ema = False,
    random_weights: options.RandomWeights = None,
    task: options.Task = None,
    config: options.Config = None,
    classes: Annotated[
        str | None, options.segmentation_option(metavar="NAME,NAME,...", help="These instead of the strongest ones.")
    ] = None,
    top: Annotated[int, options.segmentation_option(min=1, metavar="N", help="How many of the strongest to draw.")] = 8,
    mode: options.Mode = None,
    text: options.Text = None,
    text_encoder: options.TextEncoderName = None,
    tokens: Annotated[
        bool, options.referring_option("--tokens", help="Maps of tokens, the parts of words, instead of whole words.")
    ] = False,
    separate: Annotated[
        bool, options.running_option("--separate", help="Also write each map alone, into the folder cat_maps.")
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
    Images of several folders, or of equal names, give a/cat.jpg_maps.png, as `predict` names them.
    """
    model_options = options.ModelOptions(
        checkpoint, random_weights, task, config, device, precision, attention_backend, ema
    )
    listing = Listing(images)
    naming = listing.naming([])
    paths = list(listing.paths())
    several = [f"_maps_{i}{ending}" for i in range(1, len(text or []) + 1) for ending in (".png", "")]
    files.check_not_overwritten(output, map(naming.stem, paths), ["_maps.png", "_maps", *several], paths)
    files.prepare_output(output)

    with error_console().status("loading the model"):
        model = model_options.load()
        chosen = _find_classes(model, classes)
        predictor_options: dict[str, Any] = {"with_maps": True} | ({} if mode is None else {"mode": mode})
        predictor_options |= options.text_options(model, text, text_encoder, random_weights)
        predictor = options.make_noting_predictor(model, predictor_options)
    notes = options.notes(random_weights, predictor_options.get("text_encoder")) + predictor.notes
    header = model_options.header(model, notes)
    footer = partial(running.peak_memory, header["device"])
    sink = ResultsFile(output / "maps.json", header, only=naming.total == 1, footer=footer)
    write = partial(_write, output, naming, chosen, top, tokens, separate)
    running.run(
        listing.images(naming, Shard()), naming.total, predictor, write, sink, header, prefetch=0, print_json=json
    )


def _find_classes(model: Perceiver, classes: str | None) -> list[int] | None:
    """Return the numbers of the classes asked for. Raises InputError for models without maps and unknown classes."""
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
    output: Path,
    naming: Naming,
    chosen: list[int] | None,
    top: int,
    tokens: bool,
    separate: bool,
    result: Any,
    name: str,
) -> running.Record:
    """Write the maps of a result of segmentation or referring. Returns what is in them, and the files' names."""
    path = output / f"{naming.stem(name)}_maps.png"
    files.make_folder(path.parent)
    if not isinstance(result.maps, tuple):  # segmentation's
        keys = result.maps.strongest(top) if chosen is None else [result.maps.names[i] for i in chosen]
        drawn, written = _draw(result, result.maps, keys, path, separate)
        return {"maps": drawn, "files": [file.relative_to(output).as_posix() for file in written]}
    sentences, all_written = [], []
    for i, (sentence, maps) in enumerate(zip(result.sentences, result.maps, strict=True), 1):
        place = path if len(result.maps) == 1 else path.with_stem(f"{path.stem}_{i}")
        shown = maps.by_token() if tokens else maps
        drawn, written = _draw(result, shown, _of_sentence(shown, top), place, separate)
        sentences.append({"text": sentence, "maps": drawn})
        all_written += written
    return {"sentences": sentences, "files": [file.relative_to(output).as_posix() for file in all_written]}


def _of_sentence(maps: AttentionMaps, top: int) -> list[str | int]:
    """Return the sentence's words in order, else its tokens, or the strongest ones where no names are known."""
    if maps.words:
        return list(maps.words)
    marks = ("<start>", "<end>", "<pad>")
    named: list[str | int] = [name for name in maps.names if isinstance(name, str) and not name.startswith(marks)]
    return named or maps.strongest(top)


def _draw(
    result: Result, maps: AttentionMaps, keys: list[str | int], path: Path, separate: bool
) -> tuple[list[running.Record], list[Path]]:
    """Write the grid and, if asked for, single maps. Returns a record per map, and the files."""
    written = [save_png(heatmap_grid(result.image, maps, keys), path)]
    folder = path.with_suffix("")
    if separate:
        files.make_folder(folder)
    drawn = []
    for key in keys:
        heat = maps[key]
        drawn.append({"name": key, "mean": float(heat.mean()), "max": float(heat.max())})
        if separate:
            number = maps.channels(key)[0]
            single = folder / f"{number:03d}_{re.sub('[^0-9A-Za-z-]+', '_', str(key))}.png"
            written.append(save_png(heatmap_overlay(result.image, heat, title=str(key)), single))
    return drawn, written
