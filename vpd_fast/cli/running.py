"""Going through many images: progress, time, peak memory, and carrying on when one is broken."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vpd_fast.cli.files import write_file
from vpd_fast.errors import ImageError
from vpd_fast.files import write_json

if TYPE_CHECKING:
    import torch

Record = dict[str, Any]


def run_images(
    images: Sequence[Path],
    stems: Sequence[str],
    predictor: Callable[[Any], Any],
    write: Callable[[Any, str], Record],
    header: Record,
    results_path: Path,
    print_json: bool,
) -> None:
    """Predict on each image, write its files, and write `results_path`: `header`, one record per image, peak memory.

    predictor: array -> result. write: (result, stem) -> what to record, {"files": [...], ...}.
    Prints the header's notes and a summary (or the JSON) on stdout, a progress bar on stderr if that is a terminal.
    Images that fail (unreadable, too large for the memory, results not writable) are reported at the end, and the exit
    code is 1; the error of an only image is raised as ImageError.
    """
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if not print_json:
        for note in header["notes"]:
            typer.echo(f"note: {note}")
    records: list[Record] = []
    console = error_console()
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("", total=len(images))
            for path, stem in zip(images, stems, strict=True):
                progress.update(bar, description=escape(path.name))
                try:
                    record = _run_image(path, stem, predictor, write)
                except ImageError as error:
                    if len(images) == 1:
                        raise
                    record = {"image": str(path), "error": str(error)}
                records.append(record)
                progress.advance(bar)
    finally:
        # Also after an interruption: what is finished is worth having.
        if records:
            values = {**header, "images": records, **peak_memory(header["device"])}
            write_file(results_path, partial(write_json, values=values))
    failed = [record for record in records if "error" in record]
    for record in failed:
        typer.echo(f"failed: {' '.join(record['error'].split())}", err=True)
    typer.echo(json.dumps(values, indent=2) if print_json else _summary(values, results_path))
    if failed:
        raise typer.Exit(1)


def _run_image(path: Path, stem: str, predictor: Callable[[Any], Any], write: Callable[[Any, str], Record]) -> Record:
    import torch

    from vpd_fast.inference import read_image

    try:
        start = time.perf_counter()
        image = read_image(path)
        result = predictor(image)
        seconds = time.perf_counter() - start
        size = {"width": image.shape[1], "height": image.shape[0]}
        return {"image": str(path), **size, "seconds": round(seconds, 4), **write(result, stem)}
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ImageError(f"{path}: not enough memory for an image of this size") from error


def error_console() -> Any:
    """A rich console on stderr."""
    from rich.console import Console

    return Console(file=sys.stderr)


def peak_memory(device: str | torch.device) -> Record:
    """Most bytes this process ever had in memory, where the system tells, and on the GPU if it used one."""
    import torch

    found: Record = {}
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        found["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.device(device).type == "cuda":
        found["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return found


def _summary(values: Record, path: Path) -> str:
    done = [record["seconds"] for record in values["images"] if "error" not in record]
    failed = len(values["images"]) - len(done)
    parts = [f"{len(done)} image{'' if len(done) == 1 else 's'}" + (f" ({failed} failed)" if failed else "")]
    if done:
        parts.append(f"{sum(done) / len(done):.2f} s per image")
    for key, name in (("peak_memory_bytes", "peak memory"), ("peak_gpu_memory_bytes", "on the GPU")):
        if key in values:
            parts.append(f"{name} {values[key] / 2**30:.2f} GiB")
    return f"{', '.join(parts)}; written to {path.parent}"
