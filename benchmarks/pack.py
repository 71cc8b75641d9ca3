"""Makes the folder that a machine with a GPU needs where there is neither a compiler nor a network.

    benchmarks/gpu.sh pack FOLDER --python 3.12

On a machine without a GPU, but with nvcc, a package index and the Python that the other one has. The folder gets a
wheel for that Python, with CUDA C++ kernels and probes for sm_90a; the Triton kernels, compiled ahead of time by one
version of Triton, which pip brings where another one is installed; tests and benchmarks. There, in the folder,
`benchmarks/gpu.sh measure` installs the wheel beside itself and measures; `benchmarks/gpu.sh try` needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONTENT = ("benchmarks", "tests", "pyproject.toml", "LICENSE")
LEFT_OUT = ("__pycache__", "*.pyc", "results", ".cache")
MAX_BYTES = 60 << 20
CODE = "arch=compute_90a,code=sm_90a"
BUILD = {"VPD_FAST_CUDA": "ON", "VPD_FAST_PROBES": "ON", "VPD_FAST_KERNELS": "OFF"}
TRITON = "3.6.0"  # that compiles the kernels; its assembler is that of CUDA 12.8
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vpd_fast"
WITHOUT = "--kernels none leaves the kernels to the machine with the GPU, which compiles them at run time"
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


def run(what: str, command: Sequence[str], remedy: str = "", **environment: str) -> None:
    """Run a command, which prints what it does. Raises SystemExit if it fails, with what else can be done."""
    print(f"== {what}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    if subprocess.run(command, env={**os.environ, **environment}, cwd=ROOT, check=False).returncode:
        sys.exit(f"pack.py: {what} failed" + (f"; {remedy}" if remedy else ""))
    print(f"== {what}: {time.monotonic() - start:.0f} s", flush=True)


def build_wheel(python: str, folder: Path, isolated: bool) -> Path:
    """The wheel for that Python in `folder`."""
    command = [python, "-m", "pip", "wheel", "--no-deps", "-w", str(folder), str(ROOT)]
    command += [] if isolated else ["--no-build-isolation"]
    arguments = f"{os.environ.get('CMAKE_ARGS', '')} -DVPD_FAST_CUDA_CODE={CODE}".strip()
    run("wheel", command, **BUILD, CMAKE_ARGS=arguments)
    (wheel,) = folder.glob("vpd_fast-*.whl")
    return wheel


def ask(python: str, code: str, what: str) -> str:
    """What that Python prints for a line of code. Raises SystemExit if it fails, with the last line of its error."""
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        sys.exit(f"pack.py: {python} {what}: {reason}; {WITHOUT}")
    return done.stdout.strip()


def fetch_triton(python: str, version: str, cache: Path) -> Path | None:
    """Folder with that version of Triton for that Python, which pip fills once; None if it is the installed one.

    Raises SystemExit if it cannot be had, or if there is no PyTorch.
    """
    ask(python, "import torch", "has no PyTorch, which the kernels are compiled with (--kernels names another Python)")
    code = "import importlib.metadata as m; print(next((d.version for d in m.distributions(name='triton')), ''))"
    installed = ask(python, code, "does not run")
    if version in ("installed", installed):
        ask(python, "import triton", "has no Triton that compiles the kernels")
        return None
    tag = ask(python, "import sys; print('cp%d%d' % sys.version_info[:2])", "does not run")
    folder = cache / f"triton-{version}-{tag}"
    if not folder.is_dir():
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
        try:
            remedy = f"--triton installed takes {installed}; {WITHOUT}" if installed else WITHOUT
            run(f"Triton {version}", [*command, "--target", str(unfinished), f"triton=={version}"], remedy=remedy)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def compile_kernels(python: str, triton: Path | None, ptxas: str | None, out: Path, batches: Sequence[int]) -> None:
    """Write the archive of Triton's kernels. Raises SystemExit if it cannot be made."""
    out.parent.mkdir(parents=True)
    command = [python, "-m", "vpd_fast", "compile-kernels", *KERNELS, "--out", str(out)]
    for batch in batches:
        command += ["--batch", str(batch)]
    command += ["--ptxas", ptxas] if ptxas else []
    path = os.pathsep.join(str(place) for place in (triton, ROOT) if place)
    run("Triton's kernels", command, remedy=WITHOUT, PYTHONPATH=path)


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
                        help="Python that compiles the kernels (default: this one); none: at run time")  # fmt: skip
    parser.add_argument("--triton", default=TRITON, metavar="VERSION",
                        help=f"that compiles them, or `installed` (default: {TRITON})")  # fmt: skip
    parser.add_argument("--ptxas", metavar="FILE", help="assembler for them, instead of Triton's")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="FOLDER", help="for versions of Triton")
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
        compiled, triton = "none, they are compiled at run time", None
        if options.kernels != "none":  # before the wheel, which takes minutes
            triton = fetch_triton(options.kernels, options.triton, options.cache)
            compiled = f"Triton {options.triton}, batches {', '.join(map(str, options.batch))}"
        wheel = build_wheel(python, unfinished / "wheel", not options.no_build_isolation)
        if options.kernels != "none":
            archive = unfinished / "kernels" / "cubins.zip"
            compile_kernels(options.kernels, triton, options.ptxas, archive, options.batch)
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
