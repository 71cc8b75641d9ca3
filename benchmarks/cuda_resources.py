"""Registers, shared memory, spills and instructions of every CUDA kernel per architecture. Needs no GPU.

Exits with 1 if one spills, if its tensor-core or copy instructions are missing, if the loop that starts its copies is
too long, if its main loop has more instructions or fewer loads on their way than it should, or if the assembler had to
make asynchronous matrix instructions wait for each other. Compiles the kernels, or looks at the modules that were built
in place, with probes, when it is given the log of that build.

python benchmarks/cuda_resources.py
VPD_FAST_CUDA=ON VPD_FAST_PROBES=ON pip install -v -e . >build.log; python benchmarks/cuda_resources.py build.log
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import machine_code
from machine_code import LoopLimit, TurnLimit

from vpd_fast.bench.timing import table

CSRC = Path(__file__).parents[1] / "csrc"
ARCHITECTURES = ("sm_80", "sm_90a")
# Kernels whose machine code must have instructions that match all of these; the first start of the name counts.
COPIES = ("LDGSTS", "LDSM")  # cp.async, ldmatrix
BOXES = (r"UTMALDG\.4D", r"UTMALDG\.2D")  # TMA
# What kernels of clusters have: multicast, stores by TMA, registers that move between warps.
MULTICAST = (r"UTMALDG\.4D", r"UTMALDG\.2D\.MULTICAST", r"UTMASTG\.4D", "USETMAXREG")
ADDED = ("UCGABAR_ARV", r"LD\.E$")  # sums of a cluster: its barrier, loads from other blocks' shared memory
MAPS = (BOXES[0], r"UTMASTG\.4D", "USETMAXREG", *ADDED)  # of cross-attention with maps
NARROW = (r"HMMA\.16816\.F32", "LDSM", r"STG\.E\.128")  # of few numbers per position: rows leave as 16 bytes
EXPECTED = {
    "sm_80": {
        "forward_kernel<": ("HMMA", *COPIES),
        "mma_kernel<signed char": ("IMMA", *COPIES),
        "mma_kernel<": ("HMMA", *COPIES),
        "narrow_kernel<": NARROW,
    },
    "sm_90a": {
        "forward_kernel<": ("HMMA", *COPIES),
        "mma_kernel<signed char": ("IMMA", *COPIES),
        "mma_kernel<": ("HMMA", *COPIES),
        "narrow_kernel<": NARROW,
        "wgmma_kernel<signed char, 64, true>": (r"IGMMA\.64x64x32", *BOXES, *ADDED),
        "wgmma_kernel<__nv_bfloat16, 64, true>": (r"HGMMA\.64x64x16\.F32", *BOXES, *ADDED),
        "wgmma_kernel<signed char": ("IGMMA", *BOXES),
        "wgmma_kernel<vpd::device::Float8": ("QGMMA", *BOXES),
        "wgmma_kernel<": (r"HGMMA\.64x(64|128|160)x16\.F32", *BOXES),
        # Scores of whole blocks of keys, and heads that are not padded.
        "attention_kernel<__half, 160, 2": (r"HGMMA\.64x64x16\.F32", r"HGMMA\.64x160x16\.F32", BOXES[0], "USETMAXREG"),
        "attention_kernel<__half, 80, 2": (r"HGMMA\.64x128x16\.F32", r"HGMMA\.64x80x16\.F32", BOXES[0], "USETMAXREG"),
        "attention_kernel<__nv_bfloat16, 40, 3": (
            r"HGMMA\.64x128x16\.F32",
            r"HGMMA\.64x40x16\.F32",
            BOXES[0],
            "USETMAXREG",
        ),
        # Scores of all tokens, rows that leave by TMA, and sums of a cluster.
        "one_block_kernel<__half, 160, 160, 2": (r"HGMMA\.64x160x16\.F32", *MAPS),
        "one_block_kernel<__half, 160, 80, 1": (r"HGMMA\.64x160x16\.F32", r"HGMMA\.64x80x16\.F32", *MAPS),
        "one_block_kernel<__nv_bfloat16, 80, 40, 1": (r"HGMMA\.64x80x16\.F32", r"HGMMA\.64x40x16\.F32", *MAPS),
        "one_block_kernel<": ("HGMMA", *MAPS),
        "persistent_kernel<signed char": (r"IGMMA\.64x(128|160|256)x32", *MULTICAST),
        "persistent_kernel<": (r"HGMMA\.64x(128|160|256)x16\.F32", *MULTICAST),
        # Probes.
        "copy_kernel<1>": (r"UTMALDG\.2D$",),
        "copy_kernel<": (r"UTMALDG\.2D\.MULTICAST",),
        "multiply_kernel<signed char": (r"IGMMA\.64x(128|160|256)x32", r"UTMALDG\.2D"),
        "multiply_kernel<vpd::device::Float8": (r"QGMMA\.64x(128|160|256)x32", r"UTMALDG\.2D"),
        "multiply_kernel<": (r"HGMMA\.64x(128|160|256)x16\.F32", r"UTMALDG\.2D"),
        "tile_kernel": (r"IGMMA\.64x64x32",),
        "small_kernel": ("ACQBULK", "PREEXIT"),  # griddepcontrol
    },
}
# Instructions for each step of K in the loop that starts both copies, of kernels whose name begins like this.
COPY_LOOPS = {r"wgmma_kernel<.*, true>": 32, "persistent_kernel<": 42}
# Instructions in the loop that finds statistics of eight numbers: per number difference, sum, square, minimum, maximum
# and what unpacks it; it must end before the next tile does.
WATCHING = ("FMNMX", "LDS", "FFMA")
WATCH_LOOPS = {"persistent_kernel<": 72}
# Loops of kernels that bytes should limit. Per number: unpacking 1, scale and shift 1, SiLU 5, rounding 0.5 to 16 bits
# and 6 to 8 bits (as the reference: product, sum and number are each rounded, then clamped and packed); the rest are
# addresses.
LOOPS = {
    "positions_kernel<__nv_bfloat16, __nv_bfloat16, true, false, false>": LoopLimit(32, 9.0, 4),
    "positions_kernel<__nv_bfloat16, signed char, true, false, false>": LoopLimit(32, 14.2, 4),
    "positions_kernel<__half, __half, true, false, false>": LoopLimit(32, 9.0, 4),
    "positions_kernel<__half, signed char, true, false, false>": LoopLimit(32, 14.2, 4),
    # Two positions' eight columns: bias, statistics (difference, sum, square, minimum, maximum) and rounding to 16 bits
    # and back are 8 each; the rest, such as relu and the beginning of a run, is mostly skipped.
    "narrow_kernel<__nv_bfloat16, __nv_bfloat16, 2>": LoopLimit(16, 23.0, 1),
    "narrow_kernel<__half, __half, 2>": LoopLimit(16, 23.0, 1),
    # Four channels of eight pixels: two products and sums, a comparison and two choices each; what pixels share is 1.5.
    "strips_kernel<float, 2>": LoopLimit(32, 8.5, 5),
    "strips_kernel<float, 4>": LoopLimit(32, 7.2, 4),
}
# Attention. Per score: largest, fma, exponential, sum 1 each, rounding 0.5; the rest are products, barriers and what is
# per row of a block. A whole block of keys is not masked, so nothing is selected. A polynomial costs 8 in place of one.
TURNS = {  # on the architecture that has the instructions; by head dimension and one of how many is a polynomial
    f"attention_kernel<{kind}, {dim}, {groups}, {overlapped}, {polynomial}>": limit
    for (dim, polynomial), limit in {
        (40, 0): TurnLimit(64, 6.2, 66, "FSEL"),
        (40, 8): TurnLimit(64, 7.2, 58, "FSEL"),
        (80, 0): TurnLimit(64, 6.3, 66, "FSEL"),
        (160, 0): TurnLimit(32, 8.4, 34, "FSEL"),
    }.items()
    for kind in ("__half", "__nv_bfloat16")
    for groups in (1, 2, 3)
    for overlapped in ("true", "false")
}
# Cross-attention with maps. Per score: largest, fma, exponential, sum over tokens, sum over heads 1 each, rounding 0.5;
# only the last 16 tokens are masked. The rest are per head: the more per score the fewer tokens and the more channels.
TURNS |= {
    f"one_block_kernel<{kind}, {tokens}, {dim}, {groups}>": TurnLimit(tokens // 2, limit, tokens // 2, "LDL|STL")
    for (tokens, dim), limit in {
        (80, 40): 11.0,
        (80, 80): 12.5,
        (80, 160): 14.6,
        (160, 40): 8.4,
        (160, 80): 9.2,
        (160, 160): 10.2,
    }.items()
    for kind in ("__half", "__nv_bfloat16")
    for groups in (1, 2)
}
NAMED = r"\b([A-Z]*MMA|LDGSTS|LDSM|UTMALDG)\b"  # what the table shows
SERIALIZED = ("C7510", "C7512", "C7520")  # the assembler's notes that wgmma instructions wait for each other


def find_cuobjdump() -> str:
    """That of the CUDA toolkit or of Triton."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None:
        found = str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if found is None or not Path(found).is_file():
        sys.exit("there is no cuobjdump; it comes with the CUDA toolkit and with triton")
    return found


def code_of(binary: Path, architecture: str) -> dict[str, str]:
    """The machine code of each kernel by its mangled name, as text."""
    command = [find_cuobjdump(), "-sass", "-arch", architecture, str(binary)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {part.split(maxsplit=1)[0]: part for part in code.split("Function : ")[1:]}


def instructions_of(code: str) -> set[str]:
    """The machine instructions of a kernel, with their modifiers."""
    return set(re.findall(r"\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]+)", code))


def shortest_loop(code: str, parts: tuple[str, ...]) -> int | None:
    """Instructions of the shortest loop that has all these, such as a copy of a box of each kind, or None."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)
    numbers = {int(address, 16): number for number, (address, _) in enumerate(lines)}
    lengths = []
    for last, (_, line) in enumerate(lines):
        target = re.search(r"\bBRA .*\b0x([0-9a-f]+)", line)
        first = numbers.get(int(target[1], 16), last + 1) if target else last + 1
        body = " ".join(line for _, line in lines[first : last + 1])
        if all(re.search(part, body) for part in parts):
            lengths.append(last + 1 - first)
    return min(lengths, default=None)


def loops_too_long(kernel: str, code: str) -> list[str]:
    """What is wrong with the loops of that kernel that start copies or find statistics, as far as they have limits."""
    faults = []
    for limits, parts, what in ((COPY_LOOPS, BOXES, "copied step"), (WATCH_LOOPS, WATCHING, "turn of the statistics")):
        for limit in (limit for pattern, limit in limits.items() if re.match(pattern, kernel)):
            length = shortest_loop(code, parts)
            if length is None or length > limit:
                faults.append(f"{length} instructions per {what}")
    return faults


def main_loop_faults(kernel: str, architecture: str, code: str) -> list[str]:
    """What is wrong with the main loop of that kernel, if it has limits."""
    known: dict[str, LoopLimit | TurnLimit] = {**LOOPS, **(TURNS if architecture == ARCHITECTURES[1] else {})}
    limits = (limit for name, limit in known.items() if kernel.startswith(name))
    return [fault for limit in limits for fault in limit.faults(machine_code.parsed(code))]


def missing(kernel: str, architecture: str, instructions: set[str]) -> list[str]:
    """What is expected of that kernel and not there."""
    for pattern, expected in EXPECTED[architecture].items():
        if kernel.startswith(pattern):
            return [name for name in expected if not any(re.match(name, i) for i in instructions)]
    return []


def compiled(source: Path, architecture: str) -> list[dict[str, str | int]]:
    """Compiles one .cu file for one architecture: a row per kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "out.cubin")
        command = ["nvcc", "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v", f"-I{CSRC}", "-cubin"]
        done = subprocess.run([*command, str(source), "-o", str(cubin)], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{source.name} does not compile for {architecture}:\n{done.stderr}")
        found = "Compiling entry function" in done.stderr
        return rows_of(done.stderr, code_of(cubin, architecture) if found else {}, architecture)


def compile_all() -> list[dict[str, str | int]]:
    """A row per kernel and architecture of csrc/cuda, compiled here."""
    sources, probes = (sorted((CSRC / folder).glob("*.cu")) for folder in ("cuda", "cuda/probes"))
    jobs = [*product(sources, ARCHITECTURES), *product(probes, ARCHITECTURES[1:])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [row for rows in pool.map(lambda job: compiled(*job), jobs) for row in rows]


def built(log: Path) -> list[dict[str, str | int]]:
    """A row per kernel and architecture of the modules beside the package, whose build wrote that log."""
    report, rows = log.read_text(), []
    for module, architecture in (("_C_cuda", "sm_80"), ("_C_cuda", "sm_90a"), ("_C_probes", "sm_90a")):
        files = list((CSRC.parent / "vpd_fast").glob(f"{module}.*.so"))
        if not files:
            sys.exit(f"{module} has not been built in place: set VPD_FAST_CUDA=ON and VPD_FAST_PROBES=ON")
        rows += rows_of(report, code_of(files[0], architecture), architecture)
    return rows


def rows_of(report: str, kernels: dict[str, str], architecture: str) -> list[dict[str, str | int]]:
    """A row per kernel, from the assembler's report on it for that architecture and its machine code."""
    notes = [line for line in report.splitlines() if any(note in line for note in SERIALIZED)]
    entries = [entry.split("'", 4) for entry in report.split("Compiling entry function ")[1:]]
    reports = {mangled: text for _, mangled, _, target, text in entries if target == architecture}
    if unreported := kernels.keys() - reports.keys():
        sys.exit(f"there is no report of the assembler on {', '.join(sorted(unreported))} for {architecture}")
    command = {"input": "\n".join(kernels), "capture_output": True, "text": True, "check": True}
    names = subprocess.run(["c++filt", "-p"], **command).stdout.splitlines()
    rows = []
    for name, (mangled, code) in zip(names, kernels.items(), strict=True):
        kernel = re.sub(r"^(?:void )?(?:\w+::|\(anonymous namespace\)::)*", "", name)
        text, instructions = reports[mangled], instructions_of(code)
        stack, shared = re.search(r"(\d+) bytes stack", text), re.search(r"(\d+) bytes smem", text)
        faults = [f"no {absent}" for absent in missing(kernel, architecture, instructions)]
        faults += loops_too_long(kernel, code) if architecture == ARCHITECTURES[1] else []
        faults += main_loop_faults(kernel, architecture, code)
        faults += ["serialized"] if any(f"'{mangled}'" in line for line in notes) else []
        shown = sorted({found for i in instructions for found in re.findall(NAMED, i.partition(".")[0])})
        rows.append(
            {
                "architecture": architecture,
                "kernel": kernel,
                "registers": int(re.search(r"Used (\d+) registers", text)[1]),
                "shared_bytes": int(shared[1]) if shared else 0,
                "stack_bytes": int(stack[1]) if stack else 0,
                "spilled_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill", text)),
                "instructions": " ".join(shown),
                "faults": " ".join(faults),
            }
        )
    return rows


def unused(rows: list[dict[str, str | int]]) -> list[str]:
    """Patterns that no kernel's name begins with: the check would be of nothing."""
    names = {a: [row["kernel"] for row in rows if row["architecture"] == a] for a in EXPECTED}
    pairs = ((a, pattern) for a, patterns in EXPECTED.items() for pattern in (*patterns, *LOOPS))
    return [f"{a}: no kernel {p}" for a, p in pairs if not any(name.startswith(p) for name in names[a])]


def main(log: str | None = None) -> int:
    """Prints the table. Returns the exit code."""
    rows = built(Path(log)) if log else compile_all()
    print(table(rows))
    faults = unused(rows)
    print("\n".join(faults))
    return 1 if faults or any(row["spilled_bytes"] or row["faults"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
