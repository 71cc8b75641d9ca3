"""Registers, shared memory, spills and tensor-core instructions of the Triton kernels, as VPD's shapes launch them.

Compiles for sm_80 and sm_90 without a GPU; exits with 1 if a kernel spills, or if a 16-bit matrix product does not run
on tensor cores. Takes a few minutes the first time; Triton keeps what it has compiled.

python benchmarks/triton_resources.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels are not compiled

import torch
import triton
from timing import table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vpd_fast.kernels import cross_attention_maps, cross_attention_maps_backward

HEADS = 8
CAPABILITIES = (80, 90)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}
OPTIONS = ("num_warps", "num_stages")

Launch = tuple[Any, dict[str, Any]]  # kernel, arguments


def shapes() -> Iterator[tuple[torch.dtype, int, int, int, int | None]]:
    """dtype, rows, head dimension, tokens, categories."""
    for rows, dim in ((4096, 40), (1024, 80), (256, 160)):
        for tokens in (40, 77, 150, 847):
            yield torch.bfloat16, rows, dim, tokens, None
        yield torch.bfloat16, rows, dim, 150, 100
        yield torch.float32, rows, dim, 150, None
    yield torch.bfloat16, 4096, 40, 77, 20
    for dim in (8, 64, 128):  # one power of two: other code than the sums above
        yield torch.bfloat16, 1024, dim, 77, None


def launches(dtype: torch.dtype, rows: int, dim: int, tokens: int, count: int | None) -> list[Launch]:
    """What forward and backward launch, recorded instead of run; the tensors have no memory."""
    recorded: list[Launch] = []
    for module in (cross_attention_maps, cross_attention_maps_backward):
        module.launch = lambda kernel, grid, on, **arguments: recorded.append((kernel, arguments))

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k = empty(2, rows, HEADS * dim), empty(1, tokens, HEADS * dim)
    maps = empty(2, rows, count or tokens, dtype=torch.float32)
    categories = count and SimpleNamespace(
        ids=empty(tokens, dtype=torch.int32),
        weights=empty(count, dtype=torch.float32),
        tokens=empty(tokens, dtype=torch.int32),
        offsets=empty(count + 1, dtype=torch.int32),
        count=count,
    )
    options = {"heads": HEADS, "scale": 0.1, "weight": 0.2, "categories": categories, "average_heads": True}
    for one_pass in (True, False):
        cross_attention_maps.forward(q, k, k, q, maps, maps, **options, one_pass=one_pass)
    cross_attention_maps_backward.backward(q, maps, q, k, k, q, k, k, **options)
    return recorded


def source(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, str], dict, dict]:
    """Signature, constants and attributes, specialised as Triton does at a launch."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return signature, constants, attributes


def resources(kernel: Any, arguments: dict[str, Any], capability: int) -> dict[str, Any]:
    """Compiles one kernel; a row of the table."""
    compiled = triton.compile(
        ASTSource(kernel, *source(kernel, arguments)),
        target=GPUTarget("cuda", capability, 32),
        options={name: arguments[name] for name in OPTIONS if name in arguments},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "out.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    instructions = re.findall(r"(wgmma)\.mma_async|(mma)\.sync", compiled.asm["ptx"])
    tensor_cores = " ".join(sorted({name for pair in instructions for name in pair if name}))
    sixteen_bit = "q" in arguments and arguments["q"].dtype != torch.float32
    return {
        "kernel": kernel.__name__,
        "architecture": f"sm_{capability}",
        "dtype": str(arguments["q"].dtype).removeprefix("torch.") if "q" in arguments else "",
        "head_dim": arguments.get("D", ""),
        "tokens": f"{arguments['L0']}+{arguments['L1']}" if "L0" in arguments else arguments.get("L_BLOCK", ""),
        "rows": arguments.get("ROWS", ""),
        "categories": arguments.get("C_BLOCK") or "",
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "shared_bytes": compiled.metadata.shared,
        "spilled_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "tensor_cores": tensor_cores or ("missing" if sixteen_bit and "tt.dot" in compiled.asm["ttir"] else ""),
    }


def main() -> int:
    """Prints the table. Returns the exit code."""
    different = {}
    for shape in shapes():
        for kernel, arguments in launches(*shape):
            constants = [(p.name, arguments[p.name]) for p in kernel.params if p.is_constexpr]
            dtype = arguments["q"].dtype if "q" in arguments else None
            with_categories = arguments.get("ids") is not None
            different.setdefault((kernel.__name__, dtype, with_categories, *constants), (kernel, arguments))
    rows = [resources(*launch, capability) for launch in different.values() for capability in CAPABILITIES]
    print(table(rows))
    return 1 if any(row["spilled_bytes"] or row["tensor_cores"] == "missing" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
