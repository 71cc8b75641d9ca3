"""`vpd-fast predict` for very many images: shards, resuming, records on disk at once, memory that does not grow."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from vpd_fast.cli import running
from vpd_fast.cli.files import prepare_output
from vpd_fast.errors import InputError, VPDFastError
from vpd_fast.inference.shards import Records, Shard, predict_shard, read_list, relative_name, walk_images
from vpd_fast.pictures import IMAGE_SUFFIXES

STDIN = "-"


@dataclass(frozen=True)
class AtScale:
    """What the options of the panel "At scale" ask for; checked when made. Raises InputError."""

    list_file: str | None
    recursive: bool
    root: Path | None
    shard: Shard
    resume: bool
    prefetch: int

    def __post_init__(self) -> None:
        if self.prefetch < 1:
            raise InputError(f"--prefetch must be at least 1, got {self.prefetch}")

    def local_device(self, device: str) -> str:
        """The GPU of this process, where torchrun started several on a machine and none was named."""
        return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device

    def images(self, sources: list[str]) -> tuple[Callable[[], Iterator[tuple[str, str]]], int | None]:
        """(name, path) of this shard's images, listed anew by each call, and how many; None where that is not known.

        Raises InputError where there is none, or one is not below the root.
        """
        root = os.path.abspath(self.root or (sources[0] if len(sources) == 1 and os.path.isdir(sources[0]) else "."))
        if not os.path.isdir(root):
            raise InputError(f"--root {root}: not a folder")

        def listed() -> Iterator[tuple[str, str]]:
            for path in self.shard.take(self._paths(sources, root)):
                yield relative_name(path, root), os.path.join(root, path)

        if self.list_file == STDIN:
            return listed, None
        total = sum(bool(relative_name(path, root)) for path in self._paths(sources, root))
        if not total:
            raise InputError(f"no images ({' '.join(IMAGE_SUFFIXES)}) in {self.list_file or ' '.join(sources)}")
        return listed, len(range(self.shard.index, total, self.shard.count))

    def _paths(self, sources: list[str], root: str) -> Iterator[str]:
        if self.list_file == STDIN:
            yield from read_list(sys.stdin)
        elif self.list_file is not None:
            try:
                with open(self.list_file, encoding="utf-8", errors="surrogateescape") as file:
                    yield from read_list(file)
            except OSError as error:
                raise InputError(f"--list {self.list_file}: cannot be read ({error.strerror})") from error
        for source in sources:
            path = os.path.abspath(source)
            if os.path.isdir(path):
                yield from walk_images(path, IMAGE_SUFFIXES, self.recursive)
            elif os.path.exists(path):
                yield path
            else:
                raise InputError(
                    f"{source} does not exist; expected files and folders, quoted globs go without these options"
                )


def check_output(output: Path, sources: Iterable[str]) -> None:
    """Make the output folder. Raises InputError where results would land among the images."""
    place = output.resolve()
    for source in sources:
        folder = Path(source).resolve()
        if folder.is_dir() and (place == folder or folder in place.parents):
            raise InputError(f"--output {output}: is in {source}, where images are looked for; choose another folder")
    prepare_output(output)


def run(
    at_scale: AtScale,
    listing: tuple[Callable[[], Iterator[tuple[str, str]]], int | None],
    predictor: Callable[[Any], Any],
    write: Callable[[Any, str], running.Record],
    header: running.Record,
    output: Path,
    print_json: bool,
) -> None:
    """Predict on the images that `at_scale.images` found: a record per image in `output`, progress on stderr, a summary
    on stdout. The exit code is 1 if images failed.
    """
    listed, total = listing
    if not print_json:
        for note in header["notes"]:
            typer.echo(f"note: {note}")
    start = time.perf_counter()
    with ExitStack() as stack:
        kept = {**header, "device": header["device"].partition(":")[0]}  # whichever GPU a process has
        records = stack.enter_context(Records(output, at_scale.shard, kept, at_scale.resume))
        progress = stack.enter_context(_Progress(total, at_scale.shard))
        try:
            for record in predict_shard(predictor, listed(), write, records, prefetch=at_scale.prefetch):
                progress.update(record, records)
        except (VPDFastError, KeyboardInterrupt):
            typer.echo(f"stopped: {records.done} images done, {records.failed} failed; go on with --resume", err=True)
            raise
    seconds = time.perf_counter() - start
    values = {
        "done": records.done, "failed": records.failed, "skipped": records.skipped, "seconds": round(seconds, 3),
        "results": str(records.path), **({"failed_list": str(records.failed_path)} if records.failed else {}),
        **running.peak_memory(header["device"]),
    }  # fmt: skip
    typer.echo(json.dumps(values, indent=2) if print_json else _summary(values))
    if records.failed:
        typer.echo(f"failed images and their reasons: {records.failed_path}", err=True)
        raise typer.Exit(1)


def _summary(values: running.Record) -> str:
    text = f"{values['done']} images"
    if values["done"] and values["seconds"]:
        text += f", {values['done'] / values['seconds']:.2f} per second"
    counts = [
        f"{values[name]} {said}" for name, said in (("failed", "failed"), ("skipped", "done before")) if values[name]
    ]
    if counts:
        text += f" ({', '.join(counts)})"
    if "peak_memory_bytes" in values:
        text += f", peak memory {values['peak_memory_bytes'] / 2**30:.2f} GiB"
    return f"{text}; written to {Path(values['results']).parent}"


class _Progress:
    """A bar with rate and remaining time on a terminal; elsewhere, as in a cluster's log, a line a minute."""

    EVERY = 60.0  # seconds

    def __init__(self, total: int | None, shard: Shard) -> None:
        from tqdm import tqdm

        label = "" if shard.count == 1 else f"shard {shard.index}/{shard.count}"
        self._bar = tqdm(total=total, unit="image", desc=label, disable=not sys.stderr.isatty(), smoothing=0.05)
        self._label, self._total = label, total
        self._last = time.monotonic()

    def update(self, record: running.Record, records: Records) -> None:
        seen = records.done + records.failed + records.skipped
        if not self._bar.disable:
            self._bar.update(seen - self._bar.n)
            self._bar.set_postfix(failed=records.failed, refresh=False)
        elif time.monotonic() - self._last > self.EVERY:
            self._last = time.monotonic()
            of = "" if self._total is None else f" of {self._total}"
            typer.echo(f"{self._label} {seen}{of} images, {records.failed} failed".strip(), err=True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
