"""`vpd-fast convert`: checkpoints from one format to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from vpd_fast.checkpoints import convert as convert_checkpoint
from vpd_fast.checkpoints import load_checkpoint
from vpd_fast.checkpoints.convert import TARGETS
from vpd_fast.cli import options
from vpd_fast.config import PRECISIONS
from vpd_fast.engine import Policy, optimize
from vpd_fast.errors import InputError
from vpd_fast.interop.export import FORMATS, save_export
from vpd_fast.progress import error_console

DEVICES = ("cpu", "cuda")
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Checkpoint: VPD, Stable Diffusion or ours.")],
    destination: Annotated[Path, typer.Argument(metavar="DESTINATION", help="File or folder to write.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="pretrained: this project's folder. vpd: a file like the released ones. ldm: a file with Stable "
            "Diffusion's original names. diffusers: a folder. engine: a folder of the fast model, see --precision. "
            "onnx, export (torch.export), aoti (AOTInductor): a file that runs without this package.",
        ),
    ],
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help=f"{', '.join(DTYPES)}. [default: as in the source]")
    ] = None,
    ema: options.Ema = False,
    precision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"Of an engine: {', '.join(PRECISIONS)}. [default: int8]"),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"What an engine is for: {', '.join(DEVICES)}. One for cuda needs no GPU to be made, and in fp32, "
            "bf16 and int8 runs on CPUs as well, slower than one for them. [default: cpu]",
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Height and width that onnx, export and aoti are for. [default: the model's base_size]"
        ),
    ] = None,
) -> None:
    """Convert a checkpoint, and print what became of its tensors.

    A VPD model becomes any format, Stable Diffusion only ldm or diffusers. vpd and ldm files are written as
    .safetensors if the destination is called so, else as PyTorch files.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if size is not None and to not in FORMATS:
        raise InputError(f"--size is for --to {', '.join(FORMATS)}, not --to {to}")
    if to == "engine":
        if dtype is not None:
            raise InputError("--dtype is for checkpoints; --precision says in what an engine computes")
        _to_engine(source, destination, precision or "int8", device or "cpu", ema)
        return
    if precision is not None:
        raise InputError(f"--precision is for --to engine, not --to {to}; --dtype says in what a checkpoint is stored")
    if device is not None:
        raise InputError(f"--device is for --to engine, not --to {to}; checkpoints are the same for all devices")
    if to not in (*TARGETS, *FORMATS):
        raise InputError(f"--to must be one of {', '.join([*TARGETS, 'engine', *FORMATS])}, got {to!r}")
    stored = None if dtype is None else getattr(torch, DTYPES[dtype])
    if to in FORMATS:
        typer.echo(
            f"wrote {save_export(load_checkpoint(source, ema=ema, dtype=stored), destination, to=to, size=size)}"
        )
        return
    report = convert_checkpoint(source, destination, to=to, dtype=stored, ema=ema)
    typer.echo(str(report))


def _to_engine(source: Path, destination: Path, precision: str, device: str, ema: bool) -> None:
    if precision not in PRECISIONS:
        raise InputError(f"--precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if device not in DEVICES:
        raise InputError(f"--device must be one of {', '.join(DEVICES)}, got {device!r}")
    if destination.exists() and not destination.is_dir():
        raise InputError(f"{destination} is a file; an engine is a folder")
    # GPUs have no Winograd kernels; what a CPU has no instructions for, it can still pack.
    policy = Policy() if device == "cpu" else Policy(winograd=False, emulate=True)
    fast = optimize(
        load_checkpoint(source, ema=ema, mmap=True), precision, policy=policy, progress=error_console().is_terminal
    )
    fast.save(destination)
    typer.echo(str(fast.report()))
