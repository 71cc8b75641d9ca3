"""`vpd-fast convert`: checkpoints from one format to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vpd_fast.errors import InputError

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Checkpoint: VPD, Stable Diffusion or ours.")],
    destination: Annotated[Path, typer.Argument(metavar="DESTINATION", help="File or folder to write.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="pretrained: this project's folder. vpd: a file like the released ones. ldm: a file with Stable "
            "Diffusion's original names. diffusers: a folder.",
        ),
    ],
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help=f"{', '.join(DTYPES)}. [default: as in the source]")
    ] = None,
) -> None:
    """Convert a checkpoint, and print what became of its tensors.

    A VPD model becomes any format, Stable Diffusion only ldm or diffusers. vpd and ldm files are written as
    .safetensors if the destination is called so, else as PyTorch files.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    import torch

    from vpd_fast.checkpoints import convert as convert_checkpoint

    report = convert_checkpoint(source, destination, to=to, dtype=dtype and getattr(torch, DTYPES[dtype]))
    typer.echo(str(report))
