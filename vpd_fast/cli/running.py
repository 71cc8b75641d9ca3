"""Going through images: notes, progress, the summary, and the exit code."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import typer

from vpd_fast.errors import ModelError, VPDFastError
from vpd_fast.inference.predict_images import predict_images
from vpd_fast.inference.records import Record, Records, Sink
from vpd_fast.progress import ProgressBar

LOG_EVERY = 60.0  # seconds between lines of progress where stderr is no terminal, as in a cluster's log


def run(
    images: Iterable[tuple[str, str]],
    total: int | None,
    predictor: Callable[[Any], Any],
    write: Callable[[Any, str], Record],
    sink: Sink,
    header: Record,
    *,
    prefetch: int,
    label: str = "",
    print_json: bool,
) -> None:
    """Predict on images (name, path), write their files, and put a record for each into the sink.

    write: (result, name) -> what to record, {"files": [...], ...}. label: what a bar or a log says of this process.
    Prints the header's notes and a summary (or JSON) on stdout, progress on stderr. Images that fail are reported at
    the end, and the exit code is 1. Raises ImageError for a run that cannot go on.
    """
    at_once = isinstance(sink, Records)
    if not print_json:
        for note in (*header["notes"], *sink.notes):
            typer.echo(f"note: {note}")
    start = last = time.monotonic()
    with sink, ProgressBar(total, label) as bar:
        try:
            for record in predict_images(predictor, images, write, sink, prefetch=prefetch):
                seen = sink.done + sink.failed + sink.skipped
                failed = f", {sink.failed} failed" if sink.failed else ""
                bar.update(seen, f"{label} {record['image']}{failed}".strip())
                if not bar.visible and time.monotonic() - last > LOG_EVERY:
                    last = time.monotonic()
                    of = "" if total is None else f" of {total}"
                    typer.echo(f"{label} {seen}{of} images, {sink.failed} failed".strip(), err=True)
        except (VPDFastError, KeyboardInterrupt) as error:
            counts = f"stopped: {sink.done} images done, {sink.failed} failed"
            if at_once and not sink.is_lost():
                typer.echo(f"{counts}; go on with --resume", err=True)
            elif not at_once and isinstance(error, ModelError) and sink.done + sink.failed:
                typer.echo(f"{counts}; they are in {sink.path}, and others are to be predicted anew", err=True)
            raise
    seconds = time.monotonic() - start
    memory = peak_memory(header["device"])
    if isinstance(sink, Records):
        values = {
            "done": sink.done, "failed": sink.failed, "skipped": sink.skipped, "seconds": round(seconds, 3),
            "results": str(sink.path), **({"failed_list": str(sink.failed_path)} if sink.failed else {}), **memory,
        }  # fmt: skip
        failures = [f"failed images and their reasons: {sink.failed_path}"]
    else:
        values = sink.values
        failures = [f"failed: {' '.join(r['error'].split())}" for r in values["images"] if "error" in r]
    typer.echo(json.dumps(values, indent=2) if print_json else _summary(sink, seconds, memory))
    if sink.failed:
        for line in failures:
            typer.echo(line, err=True)
        raise typer.Exit(1)


def peak_memory(device: str | torch.device) -> Record:
    """Return the most bytes this process has had in memory, where the system tells, and on the GPU it used."""
    memory: Record = {}
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        memory["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.device(device).type == "cuda":
        memory["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return memory


def _summary(sink: Sink, seconds: float, memory: Record) -> str:
    counts = [f"{sink.failed} failed"] * bool(sink.failed) + [f"{sink.skipped} done before"] * bool(sink.skipped)
    parts = [f"{sink.done} image{'' if sink.done == 1 else 's'}" + (f" ({', '.join(counts)})" if counts else "")]
    if sink.done:
        parts.append(f"{seconds / sink.done:.2f} s per image")
    for key, name in (("peak_memory_bytes", "peak memory"), ("peak_gpu_memory_bytes", "on the GPU")):
        if key in memory:
            parts.append(f"{name} {memory[key] / 2**30:.2f} GiB")
    return f"{', '.join(parts)}; written to {sink.path.parent}"
