"""Registers, shared memory and spills of every CUDA kernel per architecture; exits with 1 if one spills. Needs no GPU.

python benchmarks/cuda_resources.py
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


def resources(source: Path, architecture: str) -> list[dict[str, str | int]]:
    """Compiles one .cu file and reads the assembler's report: a row per kernel."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v", f"-I{CSRC}", "-cubin"]
        done = subprocess.run(
            [*command, str(source), "-o", f"{folder}/out.cubin"], capture_output=True, text=True, check=False
        )
    if done.returncode:
        sys.exit(f"{source.name} does not compile for {architecture}:\n{done.stderr}")
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
            }
        )
    return rows


def main() -> int:
    """Prints the table. Returns the exit code."""
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    rows = [row for source in sources for architecture in ARCHITECTURES for row in resources(source, architecture)]
    print(table(rows))
    return 1 if not rows or any(row["spilled_bytes"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
