"""What `vpd-fast predict` does with tar shards."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import typer

from vpd_fast.cli.running import peak_memory
from vpd_fast.errors import InputError
from vpd_fast.inference.listing import Shard
from vpd_fast.inference.records import Record, Records
from vpd_fast.inference.tar_shards import check_upload, is_shard, list_shards, predict_shards
from vpd_fast.progress import ProgressBar

__all__ = ["check_upload", "run", "shards_of"]


def shards_of(images: list[str]) -> list[str]:
    """Return the tar shards among the inputs. Raises InputError where they are mixed with others, or there is none."""
    found = [image for image in images if is_shard(image)]
    if found and len(found) < len(images):
        raise InputError("tar shards and images are runs of their own: give only one of the two")
    return list_shards(found) if found else []


def run(
    names: list[str],
    part: Shard,
    predictor: Any,
    output: Path,
    header: Record,
    *,
    to: str,
    overlay: str,
    upload: str | None,
    resume: bool,
    prefetch: int,
    print_json: bool,
) -> None:
    """Predict on shards, and print what became of them; exit code 1 if an image or a shard failed."""
    sink = Records(output, part, {**header, "output": to, "overlay": overlay}, resume)
    mine, images, failed = list(part.take(names)), 0, 0
    start = time.monotonic()
    if not print_json:
        for note in (*header["notes"], *sink.notes):
            typer.echo(f"note: {note}")
    with sink, ProgressBar(len(mine), "shards") as bar:
        found = predict_shards(
            predictor, mine, output, sink, to=to, overlay=overlay, prefetch=prefetch, upload=upload
        )  # fmt: skip
        for record in found:
            images += record.get("images", 0)
            failed += record.get("failed", 0)
            bar.update(sink.done + sink.failed + sink.skipped, f"{images} images, {failed} failed")
            if "error" in record:
                typer.echo(f"failed: {record['error']}", err=True)
    values = {
        "shards": sink.done, "failed_shards": sink.failed, "skipped_shards": sink.skipped, "images": images,
        "failed": failed, "seconds": round(time.monotonic() - start, 3), "results": str(sink.path),
        **peak_memory(header["device"]),
    }  # fmt: skip
    if print_json:
        typer.echo(json.dumps(values, indent=2))
    else:
        skipped = f", {sink.skipped} shards done before" if sink.skipped else ""
        typer.echo(f"{images - failed} images of {sink.done + sink.failed} shards{skipped}: {upload or output}")
        if failed:
            typer.echo(f"{failed} images failed; their json says why", err=True)
    if failed or sink.failed:
        raise typer.Exit(1)
