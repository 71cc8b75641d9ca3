"""Registers, shared memory, spills and tensor-core instructions of the Triton kernels, as VPD's shapes launch them.

Compiles for sm_80 and sm_90 without a GPU; exits with 1 if a kernel spills more than the limits below, or if a 16-bit
matrix product does not run on tensor cores. Takes a few minutes the first time; Triton keeps what it has
compiled. With --every N a kernel is compiled for one in N of the pairs of what it is launched with and architecture.

python benchmarks/triton_resources.py [--every N]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels are not compiled

import torch
import triton

from vpd_fast.bench.compilation import compile_key
from vpd_fast.bench.timing import table
from vpd_fast.kernels import (
    conv2d,
    cross_attention_maps,
    cross_attention_maps_backward,
    group_norm_affine,
    linear,
    self_attention,
    upsample_argmax,
)
from vpd_fast.kernels.recording import recording
from vpd_fast.kernels.specialization import specialize
from vpd_fast.ops import PackedWeight, Statistics, registry
from vpd_fast.ops.statistics import run_length, statistics_shape

HEADS = 8
ARCHITECTURES = ("sm_80", "sm_90")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MAX_SPILLED = 8  # bytes; outside of loops these are two stores and two loads of a thread
# What the assembler of Triton 3.7 may spill more than those of 3.6 and 3.9 do, in float32 and for sm_80: six registers;
# and the share of a loop's instructions that accesses such, which is about what they cost of its time.
MAX_SPILLED_3_7, MAX_IN_LOOPS_3_7 = 24, 0.01
LAUNCHES: list[tuple[Any, dict[str, Any]]] = []  # kernels and arguments, recorded instead of run


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


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def empty_weight(n: int, k: int, precision: torch.dtype) -> PackedWeight:
    """A weight of n rows and k columns for GPUs."""
    scales = empty(1, n, dtype=torch.float32) if precision.itemsize == 1 else None
    sums = scales if precision == torch.int8 else None
    return PackedWeight(empty(1, n, k, dtype=precision), scales, sums, n, k)


def statistics_of(out: torch.Tensor) -> Statistics:
    """Statistics to fill, of an activation (1, ..., C)."""
    positions, channels = out[..., 0].numel(), out.shape[-1]
    return Statistics(empty(*statistics_shape(1, positions, channels), dtype=torch.float32), run_length(positions))


def launch_layers() -> None:
    """Layers of the UNet and the encoder: few and many rows, all that can be fused."""
    float32 = torch.float32
    for precision in (float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        dtype = float32 if precision == float32 else torch.bfloat16
        for rows, widths, n, options in (
            (4096, (320,), 960, {"norm": "layer"}),
            (4096, (320,), 2560, {"norm": "layer", "activation": "geglu"}),
            (4096, (1280, 320), 320, {"residual": empty(1, 4096, 320, dtype=dtype)}),
            (64, (5120, 1280), 1280, {"residual": empty(1, 64, 1280, dtype=dtype)}),
            (64, (1280,), 10240, {"norm": "layer", "activation": "geglu"}),
            (1024, (790,), 256, {}),  # features with maps, which are not aligned
            (256, (1430,), 256, {"norm": "layer"}),
        ):
            x, x2 = ([empty(1, rows, width, dtype=dtype) for width in widths] + [None])[:2]
            out = empty(1, rows, n // 2 if "activation" in options else n, dtype=dtype)
            options |= {"statistics": statistics_of(out)} if "residual" in options else {}
            weight, bias = empty_weight(n, sum(widths), precision), empty(n, dtype=float32)
            linear.forward(registry()["linear"].bind(x, weight, bias, x2=x2, out=out, **options))
        for side, widths, n, kernel, stride, padding, active in (
            (512, (128,), 128, 3, 1, (1, 1, 1, 1), True),
            (64, (640, 320), 320, 3, 1, (1, 1, 1, 1), True),
            (64, (320,), 320, 3, 2, (1, 1, 1, 1), False),
            (16, (1280,), 1280, 2, 1, (1, 0, 0, 1), False),
            (8, (1280,), 1280, 3, 1, (1, 1, 1, 1), True),
            (64, (4,), 320, 3, 1, (1, 1, 1, 1), False),
        ):
            x, x2 = ([empty(1, side, side, width, dtype=dtype) for width in widths] + [None])[:2]
            channels, out = sum(widths), empty(1, side // stride, side // stride, n, dtype=dtype)
            weight, bias = empty_weight(n, kernel * kernel * channels, precision), empty(n, dtype=float32)
            options = {"kernel": (kernel, kernel), "stride": stride, "padding": padding, "silu": active}
            options |= {"residual": out, "out": out, "statistics": statistics_of(out)}
            if active:
                options["affine"] = empty(1, 2, channels, dtype=float32)
                options["ranges"] = empty(1, 2, 32, dtype=float32)
            conv2d.forward(registry()["conv2d"].bind(x, weight, bias, x2=x2, **options))
    for channels in (128, 320, 2560):
        x, vector = empty(1, 4096, channels, dtype=torch.bfloat16), empty(channels, dtype=float32)
        affine, ranges = empty(1, 2, channels, dtype=float32), empty(1, 2, 32, dtype=float32)
        for known in (None, statistics_of(x)):
            options = {"ranges": None if known is None else ranges, "silu": True}
            group_norm_affine.forward([x], [known], vector, vector, 32, 1e-5, affine, **options)
            options["scale"] = empty(2 * channels, dtype=float32)
            group_norm_affine.forward([x, x], [known, known], *[options["scale"]] * 2, 32, 1e-5, affine, **options)


def launch_rounded() -> None:
    """Layers and attention whose results are rounded to int8, and layers that read such numbers."""
    bfloat16, int8 = torch.bfloat16, torch.int8
    for rows, width in ((4096, 320), (64, 1280)):
        t, hidden, numbers = (
            empty(1, rows, c, dtype=d) for c, d in ((width, bfloat16), (4 * width, int8), (width, int8))
        )
        rounding, more = (empty(2, columns, dtype=torch.float32) for columns in (width, 4 * width))
        first, second = empty_weight(8 * width, width, int8), empty_weight(width, 5 * width, int8)
        options = {"norm": "layer", "activation": "geglu", "rounding": more, "out": hidden}
        linear.forward(registry()["linear"].bind(t, first, x_rounding=rounding, x_out=numbers, **options))
        options = {"residual": t, "statistics": statistics_of(t), "out": t}
        linear.forward(registry()["linear"].bind(hidden, second, x2=numbers, **options))
        options = {"heads": HEADS, "scale": 0.1, "weight": 0.2, "categories": None, "average_heads": True}
        for tokens, maps in ((rows, None), (77, empty(1, rows, 77, dtype=torch.float32))):
            k = empty(1, tokens, width, dtype=bfloat16)
            for one_pass in (True, False):
                output = {"rounding": rounding, "one_pass": one_pass}
                cross_attention_maps.forward(t, k, k, numbers, maps, None, **options, **output)


def launch_one_head() -> None:
    """The KL encoder's attention, with large and with small tiles."""
    for dtype, length in product((torch.float32, torch.bfloat16), (4096, 256)):
        q = empty(1, length, 512, dtype=dtype)
        self_attention.forward(q, q, q, q, heads=1, scale=0.1)


def launch_labels() -> None:
    """Labels of one image and of windows, which more and more overlap."""
    for dtype, taps in product((torch.float32, torch.bfloat16), (2, 4, 8, 9)):
        axis = empty(512, taps, dtype=torch.int64), empty(512, taps, dtype=torch.float32)
        logits = empty(1, 1, 2, 150, 64, 64, dtype=dtype)
        upsample_argmax.forward(logits, axis, axis, empty(1, 512, 512, dtype=torch.int64))


def launch_attention(dtype: torch.dtype, rows: int, dim: int, tokens: int, count: int | None) -> None:
    """Forward and backward with maps, of as many categories as `count` says."""
    q, k = (empty(*shape, HEADS * dim, dtype=dtype) for shape in ((2, rows), (1, tokens)))
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


def spills_in_loops(cubin: Path) -> float:
    """Accesses to spilled registers between a backward branch and its target, as a share of all instructions there: of
    the innermost loop that has them, the largest of all loops."""
    code = subprocess.run([CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    found = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,6})\*/ +(.*?);", code)]
    branches = [(at, re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)) for at, text in found]
    loops = [(int(to[1], 16), at) for at, to in branches if to and int(to[1], 16) < at]
    spills = [at for at, text in found if re.search(r"\b(STL|LDL)\b", text)]
    innermost = Counter(
        min(around, key=lambda loop: loop[1] - loop[0])
        for around in ([loop for loop in loops if loop[0] <= at <= loop[1]] for at in spills)
        if around
    )
    sizes = {loop: sum(loop[0] <= at <= loop[1] for at, _ in found) for loop in innermost}
    return max((count / sizes[loop] for loop, count in innermost.items()), default=0.0)


def resources(kernel: Any, arguments: dict[str, Any], architecture: str) -> dict[str, Any]:
    """Compiles one kernel; a row of the table."""
    compiled = compile_key(specialize(kernel, arguments)[0], architecture)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "out.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        spilled = int(re.search(r"STACK:(\d+)", usage)[1])
        in_loops = spills_in_loops(cubin) if spilled else 0.0
    instructions = re.findall(r"(wgmma)\.mma_async|(mma)\.sync", compiled.asm["ptx"])
    tensor_cores = " ".join(sorted({name for pair in instructions for name in pair if name}))
    operand = first_operand(arguments)
    wanted = operand is not None and operand.dtype != torch.float32
    tile = [arguments[name] for name in ("BM", "BN", "BK") if name in arguments]
    options = [n for n in ("NORM", "SILU", "MASKED") if arguments.get(n)]
    options += [str(arguments[n]) for n in ("ROUND", "ACTIVATION") if arguments.get(n)]
    options += ["splits"] if arguments.get("partial") is not None and "KH" in arguments else []
    options += [f"taps {arguments['TAPS'] or 'counted'}"] if "TAPS" in arguments else []
    return {
        "kernel": kernel.__name__,
        "architecture": architecture,
        "dtype": "" if operand is None else str(operand.dtype).removeprefix("torch."),
        "head_dim": arguments.get("D", ""),
        "tokens": f"{arguments['L0']}+{arguments['L1']}" if "L0" in arguments else arguments.get("L_BLOCK", ""),
        "rows": arguments.get("ROWS", ""),
        "tile": "x".join(map(str, tile)),
        "options": " ".join(options),
        "categories": arguments.get("C_BLOCK") or "",
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "shared_bytes": compiled.metadata.shared,
        "spilled_bytes": spilled,
        "spills_in_loops": in_loops and max(round(in_loops, 4), 1e-4),
        "tensor_cores": tensor_cores or ("missing" if wanted and "tt.dot" in compiled.asm["ttir"] else ""),
    }


def spills(row: dict[str, Any]) -> bool:
    """Whether a kernel spills more than it may."""
    bytes_, share = MAX_SPILLED, 0.0
    if triton.__version__.startswith("3.7.") and (row["dtype"] == "float32" or row["architecture"] == "sm_80"):
        bytes_, share = MAX_SPILLED_3_7, MAX_IN_LOOPS_3_7
    return row["spilled_bytes"] > bytes_ or row["spills_in_loops"] > share


def first_operand(arguments: dict[str, Any]) -> torch.Tensor | None:
    """The tensor whose dtype is that of the products, or the input."""
    return next((arguments[name] for name in ("q", "a", "x", "probabilities", "logits") if name in arguments), None)


_JOBS: list[tuple[Any, dict[str, Any], str]] = []


def _resources_of_job(i: int) -> dict[str, Any]:
    return resources(*_JOBS[i])


def main(every: int = 1) -> int:
    """Prints the table, of one in so many compilations of a kernel. Returns the exit code."""
    with recording(lambda kernel, _, arguments: LAUNCHES.append((kernel, arguments))):
        for shape in shapes():
            launch_attention(*shape)
        launch_one_head()
        launch_layers()
        launch_rounded()
        launch_labels()
    different = {}
    for kernel, arguments in LAUNCHES:
        constants = [(p.name, arguments[p.name]) for p in kernel.params if p.is_constexpr]
        operand, missing = first_operand(arguments), [n for n, value in arguments.items() if value is None]
        dtype = None if operand is None else operand.dtype
        aligned = all(arguments.get(name, 0) % 16 == 0 for name in ("a_channels", "a2_channels", "K"))
        different.setdefault((kernel.__name__, dtype, aligned, *missing, *constants), (kernel, arguments))
    # Forked, because kernels cannot be sent to another process; a child knows its jobs by their numbers.
    jobs: dict[str, list[tuple[Any, dict[str, Any], str]]] = {}
    for kernel, arguments in different.values():
        dtypes = {getattr(argument, "dtype", None) for argument in arguments.values()}
        for architecture in ARCHITECTURES[torch.float8_e4m3fn in dtypes :]:
            jobs.setdefault(kernel.__name__, []).append((kernel, arguments, architecture))
    _JOBS.extend(job for of_kernel in jobs.values() for job in of_kernel[::every])
    with multiprocessing.get_context("fork").Pool() as pool:
        rows = pool.map(_resources_of_job, range(len(_JOBS)), chunksize=1)
    print(table(rows))
    return 1 if any(map(spills, rows)) or any(row["tensor_cores"] == "missing" for row in rows) else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one in N of each kernel's compilations")
    sys.exit(main(parser.parse_args().every))
