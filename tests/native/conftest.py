"""The emulated CUDA module."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent / "cuda_emulation"
OPERATORS = ("cross_attention_maps", "gemm", "gemm_mma", "gemm_wgmma")


@pytest.fixture(scope="session")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Kernels and bindings of the operators, and the controls of the emulated device."""
    if not shutil.which("g++"):
        pytest.skip("needs g++ (Debian: g++); on a GPU tests/ops checks the same kernels")
    folder = tmp_path_factory.mktemp("cuda_emulation")
    python = [f"-I{sysconfig.get_path('include')}", f"-I{Path(torch.__file__).parent / 'include'}"]
    sources = {ROOT / f"csrc/cuda/{name}.cu": ["-O2", "-x", "c++"] for name in OPERATORS}
    bindings = (ROOT / f"csrc/bindings/cuda/{name}.cpp" for name in OPERATORS)
    sources |= {path: ["-O0", *python] for path in bindings if path.exists()}
    sources |= {path: ["-O2", *python] for path in EMULATION.glob("*.cpp")}
    common = ["g++", "-std=c++17", "-w", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE"]
    common += [f"-I{EMULATION}", f"-I{ROOT / 'csrc'}"]
    objects = [folder / f"{number}.o" for number in range(len(sources))]
    commands = [
        [*common, *flags, "-c", str(source), "-o", str(built)]
        for (source, flags), built in zip(sources.items(), objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda command: subprocess.run(command, check=True), commands):
            pass
    library = folder / "cuda_emulated.so"
    subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(library)], check=True)
    spec = importlib.util.spec_from_file_location("cuda_emulated", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
