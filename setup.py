"""Builds the native modules with CMake; everything else about the package is in pyproject.toml.

Neither PyTorch, nor a GPU, nor the network is needed, but for VPD_FAST_KERNELS. Environment:

    VPD_FAST_CUDA=AUTO|ON|OFF   build vpd_fast._C_cuda when nvcc is found (AUTO, default), always (ON) or never (OFF)
    VPD_FAST_KERNELS=OFF|ON     compile Triton's kernels into the package (default: OFF): vpd-fast compile-kernels,
                                which takes minutes and needs --no-build-isolation, PyTorch and Triton
    VPD_FAST_PROBES=OFF|ON      build vpd_fast._C_probes, too, which benchmarks/measure.py uses (default: OFF)
    CMAKE_ARGS                  further arguments for CMake's configure step, such as those of .ci/sanitize
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    """The CUDA compiler: $CUDACXX, then PATH, then the folder of CUDA ($CUDA_HOME, $CUDA_PATH or /usr/local/cuda)."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    candidates = (os.environ.get("CUDACXX"), "nvcc", f"{home}/bin/nvcc")
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def cuda_compiler() -> str | None:
    """Path of nvcc if the CUDA module is to be built, None if not; VPD_FAST_CUDA decides."""
    mode = switch("VPD_FAST_CUDA", "AUTO", "AUTO", "ON", "OFF")
    nvcc = None if mode == "OFF" else find_nvcc()
    if mode == "ON" and nvcc is None:
        sys.exit("VPD_FAST_CUDA=ON, but nvcc was not found: put it on PATH or set CUDACXX or CUDA_HOME")
    return nvcc


def switch(variable: str, default: str, *values: str) -> str:
    """The value of an environment variable, one of several."""
    value = os.environ.get(variable, default).upper()
    if value not in values:
        sys.exit(f"{variable}={value!r} is not one of {', '.join(values)}")
    return value


COMPILE_KERNELS = switch("VPD_FAST_KERNELS", "OFF", "OFF", "ON") == "ON"
PROBES = switch("VPD_FAST_PROBES", "OFF", "OFF", "ON") == "ON"


class KernelBuild(build_py):
    """Triton's kernels are compiled before the package's files are gathered, if that is wanted."""

    def run(self) -> None:
        if COMPILE_KERNELS:
            command = [sys.executable, "-m", "vpd_fast", "compile-kernels"]
            path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
            if subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, check=False).returncode:
                sys.exit("VPD_FAST_KERNELS=ON, but the kernels could not be compiled, as is said above")
        super().run()


class CMakeBuild(build_ext):
    """One CMake configure and one build of all targets, so that one begins while another ends."""

    def run(self) -> None:
        self._configure()
        targets = [extension.name.rpartition(".")[2] for extension in self.extensions]
        self._cmake("--build", str(self.build_folder), "--target", *targets)
        super().run()

    def _configure(self) -> None:
        import pybind11

        self.build_folder = Path(self.build_temp).resolve() / "cmake"
        nvcc = cuda_compiler()
        arguments = [
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DVPD_FAST_VERSION={self.distribution.get_version()}",
            f"-DVPD_FAST_CUDA={'ON' if nvcc else 'OFF'}",
            f"-DVPD_FAST_PROBES={'ON' if nvcc and PROBES else 'OFF'}",
            *([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        # A build folder remembers the paths of the isolated environment it was configured in: start afresh.
        (self.build_folder / "CMakeCache.txt").unlink(missing_ok=True)
        self._cmake("-S", str(ROOT), "-B", str(self.build_folder), "-G", "Ninja", *arguments)

    def build_extension(self, ext: Extension) -> None:
        built = self.build_folder / Path(self.get_ext_filename(ext.name)).name
        destination = Path(self.get_ext_fullpath(ext.name))
        destination.parent.mkdir(parents=True, exist_ok=True)
        # Renamed, not overwritten: a process that has the old module mapped would crash.
        unfinished = destination.with_name(destination.name + ".tmp")
        shutil.copy2(built, unfinished)
        os.replace(unfinished, destination)

    @staticmethod
    def _cmake(*arguments: str) -> None:
        subprocess.run(["cmake", *arguments], check=True)


extensions = [Extension("vpd_fast._C", sources=[])]
if cuda_compiler():
    extensions.append(Extension("vpd_fast._C_cuda", sources=[]))
    if PROBES:
        extensions.append(Extension("vpd_fast._C_probes", sources=[]))

setup(
    # vpd_fast/kernels is a link to kernels/, which has no __init__.py: whoever has the checkout on sys.path and another
    # package called `kernels` gets the other one.
    packages=[*find_packages(include=["vpd_fast", "vpd_fast.*"]), "vpd_fast.kernels"],
    package_data={
        "vpd_fast": ["py.typed", "**/*.json", "**/*.yaml", "assets/**/*.safetensors", "assets/**/*.txt"],
        "vpd_fast.kernels": ["configs/*.json", "cubins.zip"],
    },
    ext_modules=extensions,
    cmdclass={"build_ext": CMakeBuild, "build_py": KernelBuild},
)
