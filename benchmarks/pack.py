"""Makes the folder that a machine with a GPU needs where there is neither a compiler nor a network.

    benchmarks/gpu.sh pack FOLDER --python 3.12

On a machine without a GPU, but with nvcc and the Python that the other one has. The folder gets a wheel for that
Python, with CUDA C++ kernels and probes for sm_90a; the Triton kernels, compiled ahead of time; tests and benchmarks.
There, in the folder, `benchmarks/gpu.sh measure` installs the wheel beside itself and measures.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONTENT = ("benchmarks", "tests", "pyproject.toml", "LICENSE")
LEFT_OUT = ("__pycache__", "*.pyc", "results", ".cache")
MAX_BYTES = 60 << 20
CODE = "arch=compute_90a,code=sm_90a"
BUILD = {"VPD_FAST_CUDA": "ON", "VPD_FAST_PROBES": "ON", "VPD_FAST_KERNELS": "OFF"}
# What the passes of measure.py launch.
KERNELS = ("--arch", "sm_90", "--task", "segmentation", "--size", "512")


def find_python(name: str) -> str:
    """The interpreter of a version such as 3.12, or of a path. Raises SystemExit if there is none."""
    version = re.fullmatch(r"3\.\d+", name)
    found = shutil.which(f"python{name}" if version else name)
    if found is None:
        sys.exit(f"pack.py: --python {name}: there is no such interpreter on PATH")
    command = [found, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or (version and done.stdout.strip() != name):
        sys.exit(f"pack.py: --python {name}: {found} does not run: {(done.stderr or done.stdout).strip()[-300:]}")
    return found


def run(what: str, command: Sequence[str], **environment: str) -> None:
    """Run a command, which prints what it does. Raises SystemExit if it fails."""
    print(f"== {what}: {' '.join(command)}", flush=True)
    if subprocess.run(command, env={**os.environ, **environment}, cwd=ROOT, check=False).returncode:
        sys.exit(f"pack.py: {what} failed")


def build_wheel(python: str, folder: Path, isolated: bool) -> Path:
    """The wheel for that Python in `folder`."""
    command = [python, "-m", "pip", "wheel", "--no-deps", "-w", str(folder), str(ROOT)]
    command += [] if isolated else ["--no-build-isolation"]
    arguments = f"{os.environ.get('CMAKE_ARGS', '')} -DVPD_FAST_CUDA_CODE={CODE}".strip()
    run("wheel", command, **BUILD, CMAKE_ARGS=arguments)
    (wheel,) = folder.glob("vpd_fast-*.whl")
    return wheel


def compile_kernels(python: str, out: Path, ptxas: str | None, batches: Sequence[int]) -> str:
    """Write the archive of Triton's kernels if that Python can make it; returns what became of it, in words."""
    probe = subprocess.run([python, "-c", "import torch, triton"], capture_output=True, check=False)
    if probe.returncode:
        return f"none, they are compiled at run time: {python} has no Triton (--kernels names another Python)"
    out.parent.mkdir(parents=True)
    command = [python, "-m", "vpd_fast", "compile-kernels", *KERNELS, "--out", str(out)]
    for batch in batches:
        command += ["--batch", str(batch)]
    command += ["--ptxas", ptxas] if ptxas else []
    run("Triton's kernels", command, PYTHONPATH=str(ROOT))
    return f"batches {', '.join(map(str, batches))}"


def copy_content(folder: Path) -> None:
    """Tests, benchmarks and their settings."""
    for name in CONTENT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
        else:
            shutil.copy2(ROOT / name, folder / name)


def check_size(folder: Path, most: int = MAX_BYTES) -> int:
    """Bytes of all files. Raises SystemExit if they are more than `most`, with the largest."""
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    total = sum(sizes.values())
    if total > most:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:5]
        names = ", ".join(f"{path.relative_to(folder)} ({sizes[path] >> 20} MiB)" for path in largest)
        sys.exit(f"pack.py: {folder} has {total >> 20} MiB, allowed are {most >> 20}; the largest are {names}")
    return total


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="must not exist yet")
    parser.add_argument("--python", default=f"{sys.version_info[0]}.{sys.version_info[1]}", metavar="VERSION|PATH",
                        help="Python of the machine with the GPU (default: this one)")  # fmt: skip
    parser.add_argument("--kernels", default=sys.executable, metavar="PATH",
                        help="whose Triton compiles the kernels (default: this Python); none: at run time")  # fmt: skip
    parser.add_argument("--ptxas", metavar="FILE", help="assembler for them, instead of Triton's")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8], help="of the compiled kernels")
    parser.add_argument("--no-build-isolation", action="store_true", help="with the build tools of that Python")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    if folder.exists():
        sys.exit(f"pack.py: {options.folder} is there already")
    python = find_python(options.python)
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        wheel = build_wheel(python, unfinished / "wheel", not options.no_build_isolation)
        compiled = "none, they are compiled at run time"
        if options.kernels != "none":
            archive = unfinished / "kernels" / "cubins.zip"
            compiled = compile_kernels(options.kernels, archive, options.ptxas, options.batch)
        copy_content(unfinished)
        facts: dict[str, Any] = {"wheel": wheel.name, "kernels": compiled}
        facts["bytes"] = check_size(unfinished)
        (unfinished / "pack.json").write_text(json.dumps(facts, indent=1) + "\n")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{folder}: {facts['bytes'] / 2**20:.1f} MiB; Triton's kernels: {compiled}\n"
          f"on the machine with the GPU: {folder.name}/benchmarks/gpu.sh measure")  # fmt: skip


if __name__ == "__main__":
    main()
