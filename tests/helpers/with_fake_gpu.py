"""A plugin of pytest (`-p tests.helpers.with_fake_gpu`) that collects as on a machine with an H200, to compute nothing.

Of every collected case that may be refused it asks all calls that can be reached, and prints as JSON which are refused,
how many are taken, which call nothing, and which functions have no case left of an implementation.
"""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vpd_fast import _native

from .fake_gpu import attention_scratch

CAPABILITY = (9, 0)


def pretend() -> None:
    """From now on PyTorch finds an H200, and the native module for GPUs is there."""
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_capability = lambda device=None: CAPABILITY
    cuda.get_device_name = lambda device=None: "H200"
    cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=132)
    Tensor.cuda = lambda x, *_, **__: x.to("cuda")
    missing = _native.why_missing
    _native.why_missing = lambda name: None if name == "_C_cuda" else missing(name)
    from vpd_fast.ops import _attention

    _attention._cuda_scratch = attention_scratch


pretend()
from . import decisions  # noqa: E402

decisions.leave_out_refused = partial(decisions.leave_out_refused, first_only=False)


class Report:
    """What is collected, by node and implementation."""

    def __init__(self) -> None:
        self.left_out: set[str] = set()

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Asks also where no conftest.py does."""
        decisions.leave_out_refused(config, items)

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        """Cases that are refused are left out here."""
        self.left_out |= {name for item in items for name in functions_of(item)}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Prints what is left."""
        answers = {item.nodeid: item.stash[decisions.REASONS] for item in session.items if functions_of(item)}
        taken = {name for item in session.items for name in functions_of(item)}
        result = {
            "taken": sum(bool(found) and not any(found) for found in answers.values()),
            "refused": {name: next(filter(None, found)) for name, found in answers.items() if any(found)},
            "unasked": [name for name, found in answers.items() if not found],
            "without": sorted(self.left_out - taken),
        }
        print("\nDECISIONS", json.dumps(result))


def functions_of(item: pytest.Item) -> list[str]:
    """The function of a case with each implementation that the case names."""
    return [f"{item.nodeid.partition('[')[0]} by {name}" for name in sorted(decisions.implementations_of(item))]


def pytest_configure(config: pytest.Config) -> None:
    """Registers the report."""
    config.pluginmanager.register(Report())
