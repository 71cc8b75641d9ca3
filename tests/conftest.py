"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

# Triton's interpreter multiplies with NumPy. The OpenBLAS that NumPy would choose has, for CPUs with AVX2 and for those
# it does not know, kernels that round rows at the end of a block otherwise than the rest, and tests that compare bits
# would be about OpenBLAS. It reads this when NumPy is first imported.
_CPU = Path("/proc/cpuinfo")
_AVX512 = _CPU.is_file() and "avx512vl" in _CPU.read_text(errors="replace")
os.environ["OPENBLAS_CORETYPE"] = "SkylakeX" if _AVX512 else "Prescott"

import torch  # noqa: E402

from vpd_fast import BackboneConfig  # noqa: E402

if not torch.cuda.is_available():  # Triton kernels are interpreted; they read this when they are first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # some versions want it for deterministic algorithms

GOLDEN = Path(__file__).parent / "golden"


def _import_golden() -> ModuleType:
    """tests/golden as the package `vpd_golden`; tests are collected without touching sys.path."""
    if "vpd_golden" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "vpd_golden", GOLDEN / "__init__.py", submodule_search_locations=[str(GOLDEN)]
        )
        sys.modules["vpd_golden"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["vpd_golden"])
    return importlib.import_module("vpd_golden.case")


@pytest.fixture
def golden() -> Callable:
    """`golden("seg_small")` -> GoldenCase (tests/golden/case.py)."""
    return _import_golden().GoldenCase


@pytest.fixture
def small_backbone() -> BackboneConfig:
    """A backbone of the shape of Stable Diffusion 1.5, a tenth as wide."""
    return BackboneConfig(model_channels=32, context_dim=64, num_heads=4, vae_ch=32)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
