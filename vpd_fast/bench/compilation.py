"""Compiling Triton kernels without a GPU, and packing them into the archive that `vpd_fast.kernels` launches from."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import signal
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpd_fast.bench.cubin_files import read_cubin
from vpd_fast.bench.launches import Configuration, record_all
from vpd_fast.errors import InputError, MissingDependencyError
from vpd_fast.files import write_files

COMPRESSION = zipfile.ZIP_LZMA  # a quarter less than DEFLATE, and half a millisecond for a kernel
TIME = (1980, 1, 1, 0, 0, 0)  # of every file, so that the same kernels make the same archive
OPTIONS = {"enable_fp_fusion": True}  # where a launch does not say; other versions of Triton have another default
WARP = 32
# Names the assembler for the latest architectures, sm_90 among them in some versions of Triton.
NEWER_ASSEMBLER = "TRITON_PTXAS_BLACKWELL_PATH"


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code, threads of a block, bytes of shared memory, and versions of compiler and assembler."""

    image: bytes
    threads: int
    shared: int
    scratch: int
    triton: str
    cuda: str


def require_triton() -> None:
    """Raises MissingDependencyError unless Triton is there and compiles."""
    if importlib.util.find_spec("triton") is None:
        raise MissingDependencyError("kernels are compiled by Triton, which is not installed (pip install triton)")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise InputError("TRITON_INTERPRET=1 has kernels interpreted, not compiled; unset it")


def source_of(key: str) -> tuple[Any, dict[str, Any]]:
    """What `triton.compile` takes for a key of `specialize`: a source, and options."""
    from triton.compiler import ASTSource

    from vpd_fast.kernels.specialization import ALIGNED, CONSTANT, parse

    name, tokens, options = parse(key)
    module, _, function = name.rpartition(".")
    kernel = getattr(importlib.import_module(f"vpd_fast.kernels.{module}"), function)
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, token) in enumerate(zip(kernel.params, tokens, strict=True)):
        if token.startswith(CONSTANT):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = ast.literal_eval(token.removeprefix(CONSTANT))
        else:
            signature[parameter.name] = token.removesuffix(ALIGNED)
            if token.endswith(ALIGNED):
                attributes[(i,)] = [["tt.divisibility", 16]]
    given = {name: ast.literal_eval(value) for name, value in options.items()}
    return ASTSource(kernel, signature, constants, attributes), OPTIONS | given


def compile_key(key: str, architecture: str) -> Any:
    """What `triton.compile` returns for a key, without line information."""
    import triton
    from triton.backends.compiler import GPUTarget

    source, options = source_of(key)
    capability = int(architecture.removeprefix("sm_"))
    return triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=options)


def compile_kernel(key: str, architecture: str) -> Compiled:
    """A kernel's machine code, checked against how its arguments are packed. Raises InputError if they do not fit."""
    import triton
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas

    from vpd_fast.kernels.specialization import layout, parse

    knobs.compilation.disable_line_info = True
    knobs.compilation.store_binary_only = True
    compiled = compile_key(key, architecture)
    metadata, image = compiled.metadata, compiled.asm["cubin"]
    info = read_cubin(image)
    scratch = len(info.parameters) - len(layout(key, 0)[1])
    packing, offsets = layout(key, scratch)
    ends = [*offsets[1:], packing.size]
    fits = (
        info.name == parse(key)[0].rpartition(".")[2]
        and info.size == packing.size
        and all(at == offset and offset + size <= end
                for (at, size), offset, end in zip(info.parameters, offsets, ends, strict=True))
        and info.threads == WARP * metadata.num_warps
    )  # fmt: skip
    plain = not metadata.global_scratch_size and not metadata.profile_scratch_size and metadata.num_ctas == 1
    if not fits or not plain or scratch < 0:
        raise InputError(f"{key} cannot be launched without Triton: {info}, {metadata}")
    assembler = get_ptxas(int(architecture.removeprefix("sm_")))
    return Compiled(image, info.threads, metadata.shared, scratch, triton.__version__, assembler.version)


Job = tuple[str, str]  # architecture, key


def _compile_job(job: Job) -> Compiled | str:
    architecture, key = job
    try:
        return compile_kernel(key, architecture)
    except Exception as error:  # an exception of Triton may be nothing that another process can be sent
        return f"{key} for {architecture}: {type(error).__name__}: {error}"


def jobs_of(chosen: Iterable[Configuration], architectures: Iterable[str], report: Callable[[str], None]) -> list[Job]:
    """The kernels that passes of these configurations launch, each once."""
    from vpd_fast.kernels.specialization import specialize

    found: dict[Job, None] = {}

    def record(architecture: str, kernel: Any, _: tuple[int, ...], arguments: dict[str, Any]) -> None:
        found.setdefault((architecture, specialize(kernel, arguments)[0]))

    for configuration in record_all(chosen, record, tuple(architectures)):
        report(f"{configuration}: {len(found)} kernels so far")
    return list(found)


def _leave_signals_to_parent() -> None:
    """Undo the inherited handlers: a worker ends quietly when its pool does, also after Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def compile_all(jobs: list[Job], processes: int, report: Callable[[str], None]) -> dict[Job, Compiled]:
    """Compiles kernels side by side. What was compiled before is in Triton's cache. Raises InputError if one fails."""
    start, compiled = time.monotonic(), {}
    with multiprocessing.get_context("fork").Pool(processes, _leave_signals_to_parent) as pool:
        for job, result in zip(jobs, pool.imap(_compile_job, jobs, chunksize=1), strict=True):
            if isinstance(result, str):
                raise InputError(f"a kernel cannot be compiled: {result}")
            compiled[job] = result
            if len(compiled) % 50 == 0 or len(compiled) == len(jobs):
                report(f"{len(compiled)} of {len(jobs)} kernels in {time.monotonic() - start:.0f} s")
    return compiled


def newest(versions: Iterable[str]) -> str:
    """The latest of versions such as 12.8."""
    return max(versions, key=lambda version: [int(number) for number in version.split(".")])


def choose_assembler(ptxas: Path | None) -> None:
    """Has Triton take the given assembler, or of its own the oldest, whose machine code older drivers load, too."""
    from triton import knobs

    if ptxas is not None and knobs.NvidiaTool.from_path(str(ptxas)) is None:
        raise InputError(f"{ptxas} is no assembler of CUDA (ptxas)")
    if ptxas is not None:
        os.environ["TRITON_PTXAS_PATH"] = str(ptxas)
    if ptxas is not None or NEWER_ASSEMBLER not in os.environ:
        os.environ[NEWER_ASSEMBLER] = knobs.nvidia.ptxas.path


def write_archive(path: Path, compiled: dict[Job, Compiled], sources: str) -> None:
    """Packs kernels into one file, those with the same machine code once. sources: hash of what was compiled."""
    from vpd_fast.kernels.cubins import FORMAT, INDEX

    images: dict[str, bytes] = {}
    kernels: dict[str, dict[str, tuple[str, int, int]]] = {}
    for (architecture, key), kernel in sorted(compiled.items(), key=lambda item: item[0]):
        name = f"{architecture}/{hashlib.sha256(kernel.image).hexdigest()[:16]}.cubin"
        images[name] = kernel.image
        kernels.setdefault(architecture, {})[key] = name, kernel.threads, kernel.shared
    ((triton, scratch),) = {(kernel.triton, kernel.scratch) for kernel in compiled.values()}
    cuda = newest(kernel.cuda for kernel in compiled.values())
    facts = {"triton": triton, "cuda": cuda, "scratch": scratch, "sources": sources}
    index = {"format": FORMAT, **facts, "kernels": kernels}

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w") as file:
            for name, content in {INDEX: json.dumps(index, indent=0).encode(), **images}.items():
                file.writestr(zipfile.ZipInfo(name, TIME), content, COMPRESSION)

    write_files({path: write}, InputError)


def compile_kernels(
    path: Path,
    chosen: list[Configuration],
    architectures: list[str],
    processes: int,
    ptxas: Path | None,
    report: Callable[[str], None],
) -> None:
    """Compile the kernels that passes of these configurations launch and write their archive.

    ptxas: assembler to take instead of Triton's. report: is told of progress. Raises MissingDependencyError without
    Triton, InputError for a kernel that cannot be compiled or launched without it, or an assembler that is none.
    """
    from vpd_fast.kernels import cubins

    require_triton()
    choose_assembler(ptxas)
    sources = cubins.hash_of_sources()  # now: of files that change meanwhile, what was read is compiled
    compiled = compile_all(jobs_of(chosen, architectures, report), processes, report)
    write_archive(path, compiled, sources)
    cuda = newest(kernel.cuda for kernel in compiled.values())
    megabytes, drivers = path.stat().st_size / 1e6, f"drivers of CUDA {cuda.partition('.')[0]} and later"
    report(f"{len(compiled)} kernels, {megabytes:.1f} MB, for {drivers}: {path}")
