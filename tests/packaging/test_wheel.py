"""What a wheel contains, and that building one needs no CUDA compiler unless told so."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vpd_fast import __version__

ROOT = Path(__file__).parents[2]
BUILD_TOOLS = ("setuptools", "wheel", "pybind11", "cmake", "ninja")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(tool) for tool in BUILD_TOOLS), reason=f"needs {', '.join(BUILD_TOOLS)}"
    ),
]


def build_wheel(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    source = folder / "source"
    tracked = ("csrc", "kernels", "vpd_fast", "setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in")
    source.mkdir()
    for name in (*tracked, "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source / name)], check=True)
    for built in source.rglob("*.so"):
        built.unlink()
    (source / "kernels/cubins.zip").write_bytes(b"stands for compiled kernels")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    return subprocess.run(
        [*command, str(source)], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_content_of_the_wheel(tmp_path: Path) -> None:
    done = build_wheel(tmp_path, VPD_FAST_CUDA="OFF")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"vpd_fast-{__version__}-cp")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names}
    assert top == {"vpd_fast", f"vpd_fast-{__version__}.dist-info"}
    assert {f"vpd_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")} <= set(names)
    tables = {f"vpd_fast/kernels/configs/{path.name}" for path in (ROOT / "kernels" / "configs").glob("*.json")}
    assert tables
    assert tables <= set(names)
    assert {"vpd_fast/py.typed", "vpd_fast/kernels/cubins.zip"} <= set(names)
    assert any(name.startswith("vpd_fast/_C.") and name.endswith(".so") for name in names)
    assert not any("_C_cuda" in name for name in names)
    missing = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "*.json", "*.yaml", "assets/**/*.*")
        for path in (ROOT / "vpd_fast").rglob(pattern)
    } - set(names)
    assert not missing


def run_setup(**environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_cuda_on_without_a_compiler_is_a_clear_error(tmp_path: Path) -> None:
    done = run_setup(VPD_FAST_CUDA="ON", CUDACXX="", CUDA_HOME=str(tmp_path), PATH=str(tmp_path))
    assert done.returncode != 0
    assert "VPD_FAST_CUDA=ON, but nvcc was not found" in done.stderr


@pytest.mark.parametrize(("variable", "known"), [("VPD_FAST_CUDA", "AUTO, ON, OFF"), ("VPD_FAST_KERNELS", "OFF, ON")])
def test_an_unknown_option_is_a_clear_error(variable: str, known: str) -> None:
    done = run_setup(**{variable: "MAYBE"})
    assert done.returncode != 0
    assert f"{variable}='MAYBE' is not one of {known}" in done.stderr
