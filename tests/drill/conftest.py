"""The option that says how many files are tried, and tests that take long because of it or of `--kills`."""

from __future__ import annotations

import pytest

FEW_KILLS = 2  # the default of --kills


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--drill", type=int, default=None, metavar="N", help="damaged files to try of all kinds together")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--drill", default=None) or config.getoption("--kills") > FEW_KILLS:
        for item in items:
            if "drill" in item.keywords:
                item.add_marker(pytest.mark.slow)
