"""The option that says how many files are tried."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--drill", type=int, default=None, metavar="N", help="damaged files to try of all kinds together")
