"""Registers, shared memory, spills and matrix instructions of every CUDA kernel per architecture. Needs no GPU.

python benchmarks/cuda_resources.py     exits with 1 if one spills or should use tensor cores and does not
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import table

CSRC = Path(__file__).parents[1] / "csrc"
ARCHITECTURES = ("sm_80", "sm_90a")
ON_TENSOR_CORES = ("forward_kernel<",)


def resources(source: Path, architecture: str) -> list[dict[str, str | int]]:
    """Compiles one .cu file and reads the PTX and the assembler's report: a row per kernel."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v", f"-I{CSRC}", "-cubin"]
        keep = ["--keep", "--keep-dir", folder]
        done = subprocess.run(
            [*command, *keep, str(source), "-o", f"{folder}/out.cubin"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{source.name} does not compile for {architecture}:\n{done.stderr}")
        (ptx,) = Path(folder).glob("*.ptx")
        entries = ptx.read_text().split(".entry ")[1:]
    matrix_instructions = {entry.partition("(")[0]: entry.count("mma.sync") for entry in entries}
    rows = []
    for entry in done.stderr.split("Compiling entry function ")[1:]:
        mangled = entry.split("'")[1]
        name = subprocess.run(["c++filt", "-p", mangled], capture_output=True, text=True, check=True).stdout.strip()
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", entry))
        shared = re.search(r"(\d+) bytes smem", entry)
        rows.append(
            {
                "file": source.name,
                "architecture": architecture,
                "kernel": name.rpartition("::")[2],
                "registers": int(re.search(r"Used (\d+) registers", entry)[1]),
                "shared_bytes": int(shared[1]) if shared else 0,
                "spilled_bytes": spills,
                "mma": matrix_instructions[mangled],
            }
        )
    return rows


def main() -> int:
    """Prints the table. Returns the exit code."""
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    rows = [row for source in sources for architecture in ARCHITECTURES for row in resources(source, architecture)]
    print(table(rows))
    spilling = [row for row in rows if row["spilled_bytes"]]
    on_other_cores = [row for row in rows if row["kernel"].startswith(ON_TENSOR_CORES) and not row["mma"]]
    return 1 if not rows or spilling or on_other_cores else 0


if __name__ == "__main__":
    sys.exit(main())
