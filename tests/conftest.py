"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Triton's interpreter multiplies with NumPy. The OpenBLAS that NumPy would choose has, for CPUs with AVX2 and for those
# it does not know, kernels that round rows at the end of a block otherwise than the rest, and tests that compare bits
# would be about OpenBLAS. It reads this when NumPy is first imported.
_CPU = Path("/proc/cpuinfo")
_AVX512 = _CPU.is_file() and "avx512vl" in _CPU.read_text(errors="replace")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while they wait would slow down other workers
os.environ["OPENBLAS_CORETYPE"] = "SkylakeX" if _AVX512 else "Prescott"

import torch  # noqa: E402

from vpd_fast import BackboneConfig  # noqa: E402

from .golden.case import GoldenCase  # noqa: E402
from .helpers import processes, runs  # noqa: E402
from .helpers.addresses import check_addresses  # noqa: E402
from .helpers.backbones import SMALL, TINY  # noqa: E402
from .helpers.decisions import leave_out_refused  # noqa: E402
from .helpers.interpreter import mend_interpreter  # noqa: E402
from .helpers.selection import mark_what_a_selection_leaves_out  # noqa: E402

if not torch.cuda.is_available():  # Triton kernels are interpreted; they read this when they are first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
    mend_interpreter()
    check_addresses()

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # some versions want it for deterministic algorithms

MAX_SECONDS = float(os.environ.get("VPD_FAST_TEST_SECONDS", "60"))

# Most tests are too small to gain by threads, and some compare with processes that have one.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=2, metavar="N", help="how often the drill kills each kind of run")


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    """How often the drill kills each kind of run."""
    return request.config.getoption("--kills")


@pytest.fixture
def golden() -> type[GoldenCase]:
    """`golden("seg_small")` -> GoldenCase."""
    return GoldenCase


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature data set of each task, to be read only."""
    root = tmp_path_factory.mktemp("data")
    for task in runs.TASKS:
        runs.make_data(root, task)
    return root


@pytest.fixture
def quick_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of `vpd_fast.bench` begin with their imports done; tests/bench/test_variants.py starts whole ones."""
    monkeypatch.setattr("vpd_fast.bench.worker._SPAWN", processes.preloaded())


@pytest.fixture
def small_backbone() -> BackboneConfig:
    return SMALL


@pytest.fixture
def tiny_backbone() -> BackboneConfig:
    return TINY


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file run in one process: they share models, data sets and runs, which cost more than they do."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # `pytest_collection_modifyitems` has ordered them
    return LoadFileScheduling(config, log)


def cpu_seconds() -> float:
    """Time that this process and those it waited for have computed, however many others want the processors."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fails a test that takes long and is not marked slow."""
    begin = cpu_seconds()
    result = yield
    taken = cpu_seconds() - begin
    if taken > MAX_SECONDS and "slow" not in item.keywords:
        pytest.fail(
            f"took {taken:.0f} s of CPU time, a test that is not marked slow may take {MAX_SECONDS:g} "
            "(VPD_FAST_TEST_SECONDS): give it a smaller case, or mark it",
            pytrace=False,
        )
    return result


def pytest_sessionstart() -> None:
    gc.disable()  # ten thousand tests are no garbage, and none is made until they are collected


def pytest_collection_finish() -> None:
    """From now on nobody looks at them again."""
    gc.collect()
    gc.freeze()
    gc.enable()


def many_first(items: list[pytest.Item]) -> None:
    """Files of many tests come first, so that processes end together; those of tests/native wait for a compiler."""
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.parent.name == "native", -sizes[item.path], item.path))


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    many_first(items)
    leave_out_refused(config, items)
    mark_what_a_selection_leaves_out(items)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
