"""The emulated CUDA module."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent / "cuda_emulation"
OPERATORS = (
    *(
        "cross_attention_maps",
        "cross_attention_maps_wgmma",
        "gemm",
        "gemm_mma",
        "gemm_narrow",
        "gemm_persistent",
        "gemm_wgmma",
        "prologue",
        "self_attention",
    ),
    "upsample_argmax_strips",
)
PROBES = ("copies", "launches", "products", "tiles")


def pytest_collection_finish(session: pytest.Session) -> None:
    """One of several processes has the emulation compiled while it runs other tests."""
    cache = getattr(session.config, "cache", None)
    wanted = any("cuda" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and cache and shutil.which("g++") and os.environ.get("PYTEST_XDIST_WORKER") == "gw0":
        threading.Thread(target=compiled, args=(cache.mkdir("cuda_emulation"),), daemon=True).start()


@pytest.fixture(scope="session")
def cuda(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Kernels and bindings of the operators, and the controls of the emulated device."""
    if not shutil.which("g++"):
        pytest.skip("needs g++ (Debian: g++); on a GPU tests/ops checks the same kernels")
    cache = getattr(pytestconfig, "cache", None)
    library = compiled(cache.mkdir("cuda_emulation") if cache else tmp_path_factory.mktemp("cuda_emulation"))
    spec = importlib.util.spec_from_file_location("cuda_emulated", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled(folder: Path) -> Path:
    """The emulation as a library in that folder, which processes share."""
    commands = compile_commands()
    library = folder / f"{digest(commands)}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            for old in folder.glob("*.so"):
                old.unlink()
            with tempfile.TemporaryDirectory() as objects:
                build(commands, library, Path(objects))
    return library


def compile_commands() -> list[list[str]]:
    """The compiler's command for every source; the source is the last word."""
    python = [f"-I{sysconfig.get_path('include')}", f"-I{Path(torch.__file__).parent / 'include'}"]
    sources = {ROOT / f"csrc/cuda/{name}.cu": ["-O2", "-x", "c++"] for name in OPERATORS}
    sources |= {ROOT / f"csrc/cuda/probes/{name}.cu": ["-O2", "-x", "c++"] for name in PROBES}
    # Most of a binding's compilation is pybind11's headers: all are compiled as one.
    bindings = (ROOT / f"csrc/bindings/cuda/{name}.cpp" for name in OPERATORS)
    together = [word for path in bindings if path.exists() for word in ("-include", str(path))]
    sources[ROOT / "csrc/bindings/probes/probes.cpp"] = ["-O0", *python, *together]
    sources |= {path: ["-O2", *python] for path in sorted(EMULATION.glob("*.cpp"))}
    common = ["g++", "-std=c++17", "-w", "-Wno-psabi", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE"]
    common += [f"-I{EMULATION}", f"-I{ROOT / 'csrc'}"]
    return [[*common, *flags, "-c", str(source)] for source, flags in sources.items()]


def digest(commands: list[list[str]]) -> str:
    """Changes with the commands, the sources and the versions of compiler, Python and PyTorch."""
    version = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    state = hashlib.sha256(repr((commands, version, sys.version, torch.__version__)).encode())
    folders = (ROOT / "csrc", EMULATION)
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.is_file()):
        state.update(f"{path} ".encode() + path.read_bytes())
    return state.hexdigest()[:20]


def build(commands: list[list[str]], library: Path, folder: Path) -> None:
    """Compiles and links; a build that was stopped leaves no library."""
    objects = [folder / f"{number}.o" for number in range(len(commands))]
    finished = [[*command, "-o", str(path)] for command, path in zip(commands, objects, strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda command: subprocess.run(command, check=True), finished):
            pass
    partial = folder / "linked"
    subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(partial)], check=True)
    shutil.move(partial, library)
