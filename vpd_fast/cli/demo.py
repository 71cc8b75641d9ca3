"""`vpd-fast demo`: everything at work, on drawn scenes and with the weights that come with the package."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from vpd_fast import __version__
from vpd_fast.cli import files, options
from vpd_fast.demo import Demo, contact_sheet, run_demo
from vpd_fast.errors import ImageError
from vpd_fast.files import write_files, write_json
from vpd_fast.inference import save_png
from vpd_fast.progress import error_console

SHEET, REPORT = "sheet.png", "demo.json"


def demo(
    output: options.Output = Path("vpd-fast-demo"),
    scenes: Annotated[int, typer.Option(min=1, help="How many scenes to draw.")] = 24,
    first: Annotated[int, typer.Option(min=0, help="Number of the first one: other numbers, other scenes.")] = 0,
    split: Annotated[
        str, typer.Option(help="test, or unseen: with colours and shapes that were never together in training.")
    ] = "test",
    precision: Annotated[str, typer.Option(metavar="NAME", help="Of the fast models: fp32, bf16 or int8.")] = "int8",
    json: options.Json = False,
) -> None:
    """Segmentation, referring segmentation and depth of drawn scenes, without a download, in under a minute.

    Three miniatures that come with the package look at scenes they have not seen, as plain models and as fast ones. It
    prints how accurate both are, how far they agree and how long they take, and writes sheet.png and demo.json. The
    miniatures and their images are tiny: at full size the fast models gain much more.
    """
    files.prepare_output(output)
    with error_console().status("starting") as status:
        done = run_demo(scenes, split=split, first=first, precision=precision, report=status.update)
        status.update("drawing")
        save_png(contact_sheet(done), output / SHEET)
    record = {
        "vpd_fast": __version__, "precision": done.precision, "split": split, "first": first, "scenes": done.scenes,
        "tasks": [asdict(report) | {"speedup": report.speedup} for report in done.reports],
    }  # fmt: skip
    write_files({output / REPORT: partial(write_json, values=record)}, ImageError)
    if json:
        typer.echo(dumps(record, indent=2))
    else:
        _print(done)
        typer.echo(f"wrote {output / SHEET} and {output / REPORT}")


def _print(done: Demo) -> None:
    fast = done.precision
    rows = [("task", "metric", "plain", fast, "equal", "plain", fast, "speed-up")]
    for r in done.reports:
        rows.append(
            (
                r.task, "RMSE in m" if r.task == "depth" else r.metric, f"{r.plain:.4f}", f"{r.fast:.4f}",
                f"{100 * r.agreement:.2f} %", f"{r.plain_ms:.1f} ms", f"{r.fast_ms:.1f} ms", f"{r.speedup:.1f}x",
            )
        )  # fmt: skip
    typer.echo(f"{done.scenes} scenes of 128x128 pixels; equal: how far plain and fast agree; times are per image")
    for row in rows:
        left, right = row[:2], row[2:]
        typer.echo("".join(f"{cell:<14}" for cell in left) + "".join(f"{cell:>9}" for cell in right))
