"""`vpd-fast info`: versions, processor, native modules, GPU and optional packages."""

from __future__ import annotations

import json as json_format
from typing import Annotated

import typer


def info(json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """Print versions, instruction sets, native modules, GPU and optional packages, and why anything is missing."""
    from vpd_fast.info import collect, render

    found = collect()
    typer.echo(json_format.dumps(found, indent=2) if json else render(found))
