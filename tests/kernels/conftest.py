"""The launcher of compiled kernels, and a driver for it that records launches."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCES = Path(__file__).parent / "launcher"


class StubDriver:
    """A library with the functions of the CUDA driver that the launcher calls."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)
        self._library.stub_log.restype = ctypes.c_char_p

    def expect(self, *sizes: int) -> None:
        """Sizes of the parameters of the next launches, of whose bytes there is a record then."""
        self._library.stub_sizes((ctypes.c_int * len(sizes))(*sizes), len(sizes))

    def limit_shared(self, kilobytes: int) -> None:
        """Shared memory of a block from now on, as GPUs have it: 227 (sm_90), 163 (sm_80), 99 (sm_86, sm_89)."""
        self._library.stub_shared(kilobytes << 10)

    def launches(self) -> list[list[str]]:
        """Device, stream, kernel, grid, threads, shared memory and parameters of each launch since the last call."""
        lines = self._library.stub_log().decode().splitlines()
        self._library.stub_clear()
        return [line.split() for line in lines]


def cuda_headers() -> Path:
    """Folder of cuda.h: that of the toolkit, or of Triton."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    triton = importlib.util.find_spec("triton")
    folders = [Path(nvcc).parents[1] / "include"]
    folders += [Path(triton.origin).parent / "backends/nvidia/include"] if triton else []
    found = next((folder for folder in folders if (folder / "cuda.h").is_file()), None)
    return found or pytest.skip("needs cuda.h, of the CUDA toolkit or of triton")


def built(pytestconfig: pytest.Config, name: str, command: list[str]) -> Path:
    """A shared library, kept from run to run as long as sources and command stay."""
    if not shutil.which(command[0]):
        pytest.skip(f"needs {command[0]}")
    state = hashlib.sha256(repr((command, torch.__version__)).encode())
    for path in sorted([*SOURCES.iterdir(), *(ROOT / "csrc/bindings/cuda").glob("launcher.*")]):
        state.update(path.read_bytes())
    cache = getattr(pytestconfig, "cache", None)
    folder = cache.mkdir("launcher") if cache else Path(pytestconfig.rootpath, "build", "launcher")
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{name}-{state.hexdigest()[:16]}.so"
    with (folder / "lock").open("w") as lock:  # workers of pytest-xdist share one
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            for old in folder.glob(f"{name}-*.so"):
                old.unlink()
            subprocess.run([*command, "-shared", "-fPIC", "-O0", "-w", "-o", f"{library}.tmp"], check=True)
            shutil.move(f"{library}.tmp", library)
    return library


@pytest.fixture(scope="session")
def launcher(pytestconfig: pytest.Config) -> ModuleType:
    """The part of `_C_cuda` that launches compiled kernels."""
    folders = [sysconfig.get_path("include"), f"{Path(torch.__file__).parent}/include", f"{ROOT}/csrc", cuda_headers()]
    # As one unit: most of the time goes into what both include.
    sources = ["-include", str(ROOT / "csrc/bindings/cuda/launcher.cpp"), str(SOURCES / "module.cpp")]
    command = ["g++", "-std=c++17", "-fvisibility=hidden", *(f"-I{folder}" for folder in folders), *sources]
    library = built(pytestconfig, "launcher", command)
    spec = importlib.util.spec_from_file_location("launcher", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def stub_of(pytestconfig: pytest.Config):
    """`stub_of(12080)` -> StubDriver of that version."""

    def make(version: int) -> StubDriver:
        command = ["gcc", f"-DSTUB_VERSION={version}", str(SOURCES / "stub_driver.c")]
        return StubDriver(built(pytestconfig, f"stub{version}", command))

    return make


@pytest.fixture
def stub(stub_of) -> StubDriver:
    """A driver for CUDA 12.8 that has launched nothing, for an H200."""
    driver = stub_of(12080)
    driver.expect()
    driver.limit_shared(227)
    driver.launches()
    return driver
