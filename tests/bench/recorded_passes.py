"""Launches of small fast models through the launcher and a stub driver; a program, because tests interpret kernels.

recorded_passes.py LAUNCHER STUB FOLDER: a JSON object on standard output, see `main`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from itertools import starmap
from pathlib import Path
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from vpd_fast.bench import compilation, launches
from vpd_fast.bench.cubin_files import read_cubin
from vpd_fast.bench.engine_pass import MODELS
from vpd_fast.errors import InputError
from vpd_fast.kernels import cubins
from vpd_fast.kernels.specialization import layout, parse, specialize

ARCHITECTURE = "sm_90"
COMPILED = ("_prologue._image_range_kernel", "_statistics._partial_kernel")  # quickly


def tokens_of_triton(kernel: Any, arguments: dict[str, Any], binders: dict[int, Any] = {}) -> list[str]:  # noqa: B006
    """Tokens of a key, by Triton's own specialisation."""
    if id(kernel) not in binders:
        backend = make_backend(GPUTarget("cuda", 90, 32))
        binders[id(kernel)] = create_function_from_signature(kernel.signature, kernel.params, backend)
    values, specialization, _ = binders[id(kernel)](**arguments)
    return list(starmap(_token, zip(values.values(), specialization, strict=True)))


def _token(value: Any, found: tuple[str, Any]) -> str:
    kind, attribute = found
    return f"={value!r}" if kind == "constexpr" else kind + (":16" if attribute == "D" else "")


def dummy(key: str) -> compilation.Compiled:
    """Something in place of machine code, because compiling all kernels would take minutes."""
    threads = 32 * int(parse(key)[2].get("num_warps", 4))
    return compilation.Compiled(b"\x7fELF" + key.encode(), threads, 0, 2, "none", "12.8")


def refusal_of_another_layout(key: str) -> str:
    """The error where parameters are packed otherwise than the assembler expects them."""

    def shifted(key: str, scratch: int) -> tuple[Any, list[int]]:
        packing, offsets = layout(key, scratch)
        return packing, [offset + 4 for offset in offsets]

    with mock.patch("vpd_fast.kernels.specialization.layout", shifted):
        try:
            compilation.compile_kernel(key, ARCHITECTURE)
        except InputError as error:
            return str(error)
    return ""


def main(launcher: str, stub: str, folder: str) -> dict[str, Any]:
    """launches: of all passes. missed: of these, by a table of the kernels of the same configurations.

    disagreements: keys that Triton forms otherwise. compiled: of some kernels, what the assembler says of parameters
    and threads, and what is packed. refusal: of a kernel whose parameters would be packed otherwise.
    """
    keys: dict[str, None] = {}
    recorded, disagreements = [], []

    def record(architecture: str, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        key, _ = specialize(kernel, arguments)
        if key not in keys and parse(key)[1] != tokens_of_triton(kernel, arguments):
            disagreements.append([key, tokens_of_triton(kernel, arguments)])
        keys[key] = None
        recorded.append((kernel, grid, arguments))

    new: dict[int, int] = {}
    chosen = launches.configurations([MODELS["small"]], ["bf16", "int8"], [1, 3], [128])
    before = 0
    for configuration in launches.record_all(chosen, record, [ARCHITECTURE]):
        new[configuration.batch] = new.get(configuration.batch, 0) + len(keys) - before
        before = len(keys)
    few = [next(key for key in keys if key.startswith(name)) for name in COMPILED]
    compiled = {}
    for key in few:
        kernel = compilation.compile_kernel(key, ARCHITECTURE)
        info, (packing, offsets) = read_cubin(kernel.image), layout(key, kernel.scratch)
        said = [[at for at, _ in info.parameters], info.size, info.threads]
        compiled[key] = {"cubin": said, "packed": [offsets, packing.size, kernel.threads]}
    archive = Path(folder, "cubins.zip")
    compilation.write_archive(archive, {(ARCHITECTURE, key): dummy(key) for key in keys}, cubins.hash_of_sources())
    spec = importlib.util.spec_from_file_location("launcher", launcher)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    table = cubins.Table(cubins.Archive.read(archive), ARCHITECTURE, module.Driver(stub))
    missed = sum(not table.launch(*launch, 0, 0) for launch in recorded)
    found = {"launches": len(recorded), "keys": len(keys), "of_three_images": new[3], "missed": missed}
    return found | {"disagreements": disagreements, "compiled": compiled, "refusal": refusal_of_another_layout(few[0])}


if __name__ == "__main__":
    json.dump(main(*sys.argv[1:]), sys.stdout)
