"""`vpd-fast tune`: what computes the operators of a model fastest on this machine's GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vpd_fast.config import PRECISIONS
from vpd_fast.errors import InputError


def tune(
    precision: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"Some of {', '.join(PRECISIONS)}; may be repeated.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Images at once; may be repeated. [default: 1 and 8]")] = None,
    size: Annotated[
        list[int] | None, typer.Option(help="Side in pixels, a multiple of 64; may be repeated. [default: 512]")
    ] = None,
    task: Annotated[str, typer.Option(help="segmentation, referring or depth.")] = "segmentation",
    seconds: Annotated[float, typer.Option(help="After which what is not measured is left to the rules.")] = 1800,
    again: Annotated[bool, typer.Option("--again", help="Measure also what the table has already.")] = False,
    results: Annotated[
        list[Path] | None,
        typer.Option("--from", metavar="FILE", help="Take times from stored results, without a GPU; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Table to write. [default: the one that operators read]")
    ] = None,
) -> None:
    """Measure the operators of a fast model on this machine's GPU and write the table that they choose by.

    Of each operator every implementation is measured (Triton, CUDA C++, PyTorch's libraries), then the tiles of
    Triton's products where those are nearly the fastest. Needs no weights: they are random. What was measured is kept,
    so another call goes on. Operators read the table of their GPU that comes with vpd_fast, or the file that the
    environment variable VPD_FAST_TUNING names.
    """
    if results:
        if out is None:
            raise InputError("--from needs --out, the table to write")
        from vpd_fast.bench.tuning import collect

        typer.echo(f"{len(collect(out, results)['choices'])} choices: {out}")
        return
    chosen, batches, sizes = precision or ["bf16", "int8"], batch or [1, 8], size or [512]
    for name in chosen:
        if name not in PRECISIONS:
            raise InputError(f"--precision must be one of {', '.join(PRECISIONS)}, got {name!r}")
    for side in sizes:
        if side <= 0 or side % 64:
            raise InputError(f"--size must be a positive multiple of 64, got {side}")
    if min(batches) <= 0:
        raise InputError(f"--batch must be positive, got {min(batches)}")
    import torch

    from vpd_fast import VPDConfig
    from vpd_fast.bench.tuning import tune as run

    config = VPDConfig(task=task)
    path = out
    if path is None and torch.cuda.is_available():
        from vpd_fast.kernels.tables import path_of

        path = path_of(torch.device("cuda"))
    table = run(path or Path("table.json"), config, chosen, batches, sizes, seconds, again, typer.echo)
    typer.echo(f"{len(table['choices'])} choices, {len(table['configs'])} tiles: {path}")
