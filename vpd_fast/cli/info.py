"""`vpd-fast info`: versions, processor, native modules, GPU and optional packages; check sums of a saved model."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer


def info(
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    verify: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Instead: compare the weights of a saved model, plain or fast, with the check sums written with them.",
        ),
    ] = None,
) -> None:
    """Print versions, instruction sets, native modules, GPU and optional packages, and why anything is missing.

    With --verify, the exit code is 0 where the weights are those that were saved, 1 where they differ (the tensors, or
    the file, are named), and 2 where there are no check sums to compare with.
    """
    if verify is not None:
        _verify(verify, json)
        return
    from vpd_fast.info import collect, render

    found = collect()
    typer.echo(json_format.dumps(found, indent=2) if json else render(found))


def _verify(path: Path, print_json: bool) -> None:
    from vpd_fast.checkpoints import verify
    from vpd_fast.errors import CheckpointError
    from vpd_fast.progress import ProgressBar

    with ProgressBar(None, "MB") as bar:
        found = verify(path, lambda done, total: bar.update(done // 10**6, total=total // 10**6))
    if print_json:
        values = {"status": found.status, "tensors": found.tensors, "bytes": found.nbytes, "different": found.different}
        typer.echo(json_format.dumps({"path": str(path), **values}, indent=2))
    elif found.status == "ok":
        typer.echo(str(found))
    if found.status == "none":
        raise CheckpointError(str(found))
    if found.status == "different":
        if not print_json:
            typer.echo(str(found), err=True)
        raise typer.Exit(1)
