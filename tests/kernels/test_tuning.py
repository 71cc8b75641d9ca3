"""Which configuration a product gets: recorded, measured, or by the rule; and that all give the same result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vpd_fast import ops
from vpd_fast.errors import InputError
from vpd_fast.kernels import tables
from vpd_fast.ops.availability import triton_missing
from vpd_fast.ops.packing import FLOAT8, PackedWeight
from vpd_fast.ops.statistics import Statistics, run_length, statistics_shape

pytestmark = pytest.mark.skipif(triton_missing(torch.empty(0)) is not None, reason="interpreted only without a GPU")
tuning = pytest.importorskip("vpd_fast.kernels.tuning")

PRODUCT = tuning.GemmShape("bfloat16", (3, 3), 1, 4096, 320, 2880, 320, 1, "", 64)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, FLOAT8])
@pytest.mark.parametrize("kernel", [1, 3])
def test_all_candidates_compute_the_same(dtype: torch.dtype, kernel: int) -> None:
    """Sums in another order: exact for int8, otherwise to the rounding of float32, and once of the library's sums."""
    x, n = randn(1, 8, 8, 48), 64
    weight = PackedWeight.pack(randn(1, n, kernel * kernel * 48) / 20, dtype)
    statistics = Statistics(torch.empty(statistics_shape(1, 64, n)), run_length(64))
    how = {"kernel": (kernel, kernel), "padding": kernel // 2, "silu": True, "statistics": statistics, "impl": "triton"}
    expected = ops.conv2d(x, weight, **how)
    known, seen = statistics.data.clone(), []

    def measure(product: tuning.GemmShape, run) -> tuning.Config:
        assert (product.rows, product.n, product.k) == (64, n, kernel * kernel * 48)
        out = ops_out["out"]
        for config in tuning.candidates(product, 132):
            out.fill_(torch.nan)
            statistics.data.fill_(torch.nan)
            run(config)
            seen.append(config)
            tolerance = 0 if dtype == torch.int8 else 1e-5
            assert torch.allclose(out, expected, rtol=0, atol=tolerance * expected.abs().max().item()), config
            # M2 sums 64 squares of deviations, each wrong by twice a deviation, here about 2 at most, times 1e-5.
            assert torch.allclose(statistics.data, known, rtol=0, atol=1e-5 * 64 * 4), config
        return config

    ops_out = {"out": torch.empty_like(expected)}
    with tuning.tuning(measure):
        ops.conv2d(x, weight, out=ops_out["out"], **how)
    assert len(seen) >= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, FLOAT8])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_library_computes_the_same(dtype: torch.dtype, kernel: int) -> None:
    """Its sums get the same epilogue; those of cuDNN are rounded to 16 bits, once more than those of the kernels."""
    x, n = randn(1, 8, 8, 48).to(dtype if dtype.itemsize == 2 else torch.float32), 64
    weight = PackedWeight.pack(randn(1, n, kernel * kernel * 48) / 20, dtype)
    how = {"kernel": (kernel, kernel), "padding": kernel // 2, "silu": True, "residual": x.repeat(1, 1, 1, 2)[..., :n]}
    statistics = [Statistics(torch.full(statistics_shape(1, 64, n), torch.nan), run_length(64)) for _ in range(2)]
    expected = ops.conv2d(x, weight, impl="triton", statistics=statistics[0], **how)
    if kernel == 3 and dtype.itemsize != 2:
        with pytest.raises(InputError, match="impl='library' of conv2d cannot run here: it is a convolution in"):
            ops.conv2d(x, weight, impl="library", **how)
        return
    out = ops.conv2d(x, weight, impl="library", statistics=statistics[1], **how)
    # Both store once, which moves a number that differs by a rounding of float32 by one eps at most; cuDNN's sums are
    # rounded by another half. Deviations are squares, of numbers that are off by that.
    tolerance = 1e-5 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps * (1.5 if kernel == 3 else 1)
    for a, b, factor in ((out, expected, 1), (statistics[1].data, statistics[0].data, 2)):
        assert torch.allclose(a.float(), b.float(), rtol=0, atol=factor * tolerance * b.float().abs().max().item())


def test_the_nearest_recorded_rows_decide() -> None:
    small, large = {"BM": 1}, {"BM": 2}
    table = {PRODUCT.key: {1000: small, 4096: large}}
    for rows, expected in ((1000, small), (1400, small), (700, small), (3000, large), (5000, large), (2000, None)):
        assert tuning.nearest(table, replace(PRODUCT, rows=rows)) == expected
    assert tuning.nearest(table, replace(PRODUCT, n=640)) is None
    assert tuning.nearest(table, replace(PRODUCT, run=1)) is None


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    other = replace(PRODUCT, rows=64, activation="geglu", sources=2)
    first, second = tuning.candidates(PRODUCT, 132)[:2]
    measured = {PRODUCT: [(first, 0.5), (second, 0.7)], other: [(second, 0.1)]}
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"configs": tuning.to_rows(measured)}))
    assert tables.read(path).configs == {PRODUCT.key: {4096: first}, other.key: {64: second}}


def test_the_table_of_a_gpu_decides(monkeypatch) -> None:
    config = tuning.candidates(PRODUCT, 132)[1]
    found = tables.Found(tables.Table(Path("t"), configs={PRODUCT.key: {4096: config}}), "t")
    monkeypatch.setattr(tables, "of_device", lambda device: found)
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: 132)
    gpu = torch.device("cuda", 0)
    assert tuning.choose(PRODUCT, gpu, run=None) == config
    assert tuning.choose(replace(PRODUCT, rows=64), gpu, run=None) == tuning.by_rule(replace(PRODUCT, rows=64), 132)
    monkeypatch.setattr(tables, "of_device", lambda device: tables.Found(None, "none"))
    assert tuning.choose(PRODUCT, gpu, run=None) == tuning.by_rule(PRODUCT, 132)


def test_the_rule_gives_tiles_whole_runs() -> None:
    for run in (1, 16, 64, 128):
        for rows in (64, 256, 4096, 1 << 18):
            config = tuning.by_rule(replace(PRODUCT, run=run, rows=rows), 132)
            assert config["BM"] % run == 0
            assert 1 <= config["SPLITS"] <= 16
