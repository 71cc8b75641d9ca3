"""`vpd-fast compile-kernels`: Triton's kernels compiled ahead of time, without a GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from vpd_fast.config import PRECISIONS, SIZE_MULTIPLE
from vpd_fast.errors import InputError
from vpd_fast.tasks import TASKS

ARCHITECTURES = ("sm_80", "sm_90")


def compile_kernels(
    arch: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"Some of {', '.join(ARCHITECTURES)}; may be repeated.")
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"Some of {', '.join(PRECISIONS)}; may be repeated.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"Some of {', '.join(TASKS)}; may be repeated.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Images at once; may be repeated. [default: 1, 2, 4, 8 and 16]")
    ] = None,
    size: Annotated[
        list[int] | None, typer.Option(help="Side in pixels, a multiple of 64; may be repeated. [default: 512 and 640]")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Kernels to compile at a time. [default: as many as processors]")] = 0,
    ptxas: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Assembler instead of Triton's, such as that of CUDA 12.8.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Archive to write. [default: the one beside the kernels]"),
    ] = None,
) -> None:
    """Compile the Triton kernels that fast models launch on GPUs, so that no first call has to. Needs no GPU.

    The default is what the archive of a wheel has: all precisions and tasks, for A100, H100 and H200. It takes about a
    second per kernel on one processor; what was compiled before, Triton keeps.
    """
    given = {"--arch": (arch, ARCHITECTURES), "--precision": (precision, PRECISIONS), "--task": (task, TASKS)}
    for option, (names, known) in given.items():
        for name in names or ():
            if name not in known:
                raise InputError(f"{option} must be one of {', '.join(known)}, got {name!r}")
    for side in size or ():
        if side <= 0 or side % SIZE_MULTIPLE:
            raise InputError(f"--size must be a positive multiple of {SIZE_MULTIPLE}, got {side}")
    if min(batch or (1,)) <= 0:
        raise InputError(f"--batch must be positive, got {min(batch or (1,))}")
    if jobs < 0:
        raise InputError(f"--jobs must not be negative, got {jobs}")

    from vpd_fast.bench import compilation, launches

    compilation.require_triton()
    from vpd_fast.kernels.cubins import ARCHIVE

    models = [model for model in launches.MODELS if model.task in (task or TASKS)]
    chosen = launches.configurations(models, precision or PRECISIONS, batch or launches.BATCHES, size or launches.SIZES)
    processes = jobs or len(os.sched_getaffinity(0))
    compilation.compile_kernels(out or ARCHIVE, chosen, arch or list(ARCHITECTURES), processes, ptxas, typer.echo)
