"""Scripts of benchmarks/ as modules; tests are collected without touching sys.path."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch) -> Callable[[str], ModuleType]:
    """`script("roofline")` -> the module benchmarks/roofline.py, which finds the scripts beside it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module
