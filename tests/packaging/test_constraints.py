"""constraints.txt has one version of each package that the set-up for tests names, on every Python."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text()
PYTHONS = re.findall(r"Python :: (3\.\d+)", PROJECT)


def pins(python: str) -> Counter[str]:
    """How many versions each package has on this Python."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in found)
    where = {"python_version": python}
    return Counter(canonicalize_name(pin.name) for pin in found if pin.marker is None or pin.marker.evaluate(where))


@pytest.mark.parametrize("python", PYTHONS)
def test_one_version_of_each_package(python: str) -> None:
    found = pins(python)
    assert {name: count for name, count in found.items() if count > 1} == {}
    listed = re.findall(r'"([\w-]+)(?:\[\w+\])?[<>=]+[^"]*"', PROJECT.partition("[tool.")[0])
    optional = {"openvino", "nncf"}  # peers of measurements
    assert {"torch", "typer", "triton"} <= {canonicalize_name(name) for name in listed}
    assert {canonicalize_name(name) for name in listed} - optional <= found.keys()
