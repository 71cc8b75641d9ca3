"""How the fastest configuration is found; kernels run interpreted, and times are made up."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from vpd_fast import VPDConfig, ops
from vpd_fast.bench.tuning import Measurements, tune
from vpd_fast.cli.main import run
from vpd_fast.errors import MissingDependencyError
from vpd_fast.ops.availability import triton_missing
from vpd_fast.ops.packing import PackedWeight

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what is tested is other code without a GPU")
needs_triton = pytest.mark.skipif(triton_missing(torch.empty(0)) is not None, reason="needs Triton")


def product(rows: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    weight = PackedWeight.pack(torch.randn(1, 48, 32, generator=generator), torch.int8)
    return ops.linear(torch.randn(1, rows, 32, generator=generator), weight, norm="layer", impl="triton")


@needs_triton
def test_the_fastest_is_chosen_and_kept() -> None:
    from vpd_fast.kernels import tuning

    times = iter([3.0, 1.0, 2.0, *[9.0] * 50])
    calls = []

    def measure(call) -> float:
        call()
        calls.append(1)
        return next(times)

    measurements = Measurements({}, 132, time.monotonic() + 60, measure)
    expected = product()
    with tuning.tuning(measurements.choose):
        assert torch.equal(product(), expected)  # int8: whatever the configuration
        count = len(calls)
        assert torch.equal(product(), expected)
    assert len(calls) == count
    ((shape, found),) = measurements.found.items()
    assert (shape.rows, shape.n, shape.k, shape.dtype) == (40, 48, 32, "int8")
    assert found[0] == (tuning.candidates(shape, 132)[1], 1.0)
    assert [t for _, t in found] == sorted(t for _, t in found)
    assert measurements.left_out == 0


@needs_triton
def test_what_is_known_or_too_late_is_not_measured() -> None:
    from vpd_fast.kernels import tuning

    def measure(call) -> float:
        raise AssertionError("measured")

    seen = []
    late = Measurements({}, 132, time.monotonic() - 1, measure)
    with tuning.tuning(lambda shape, run: seen.append(shape) or late.choose(shape, run)):
        product()
    assert (late.left_out, late.found) == (1, {})
    known = {
        seen[0].key: {40: {"BM": 32, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 2, "GROUP": 8, "SPLITS": 1}}
    }
    aware = Measurements(known, 132, time.monotonic() + 60, measure)
    with tuning.tuning(aware.choose):
        assert torch.equal(product(), product())
    assert (aware.left_out, aware.found) == (0, {})


@needs_triton
def test_configurations_that_do_not_fit_are_left_out() -> None:
    from vpd_fast.kernels import tuning

    def measure(call) -> float:
        if not measurements.failed:
            measurements.failed = True
            raise RuntimeError("out of resource: shared memory")
        call()
        return 1.0

    measurements = Measurements({}, 132, time.monotonic() + 60, measure)
    measurements.failed = False
    with tuning.tuning(measurements.choose):
        product()
    ((shape, found),) = measurements.found.items()
    assert tuning.candidates(shape, 132)[0] not in [config for config, _ in found]


def test_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(MissingDependencyError, match="on an NVIDIA GPU, and PyTorch finds none"):
        tune(tmp_path / "t.json", VPDConfig(), ["int8"], [1], [512], 1.0, False, print)
    assert run(["tune", "--out", str(tmp_path / "t.json")]) == 2
    assert "error: tuning measures kernels" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "int4"], "--precision must be one of fp32, bf16, fp16, int8, fp8, got 'int4'"),
        (["--size", "100"], "--size must be a positive multiple of 64, got 100"),
        (["--batch", "0"], "--batch must be positive, got 0"),
        (["--task", "boxes"], "task must be one of segmentation, referring, depth, got 'boxes'"),
        (["--from", "results.json"], "--from needs --out, the table to write"),
        (["--from", "none.json", "--out", "t.json"], "none.json has no times of a GPU's layers or operators"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert run(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err
