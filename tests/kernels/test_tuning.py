"""Which configuration a product gets: recorded, measured, or by the rule; and that all give the same result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vpd_fast import ops
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
            try:
                run(config)
            except NotImplementedError:
                assert config == tuning.LIBRARY
                continue
            seen.append(config)
            library = config == tuning.LIBRARY and kernel == 3  # cuDNN's sums are rounded to 16 bits
            tolerance = 0 if dtype == torch.int8 else torch.finfo(dtype).eps if library else 1e-5
            assert torch.allclose(out, expected, rtol=0, atol=tolerance * expected.abs().max().item()), config
            assert torch.allclose(statistics.data, known, rtol=0, atol=max(tolerance, 1e-5) * 64 * 4), config
        return config if config != tuning.LIBRARY else seen[0]

    ops_out = {"out": torch.empty_like(expected)}
    with tuning.tuning(measure):
        ops.conv2d(x, weight, out=ops_out["out"], **how)
    assert len(seen) >= 3
    expects_library = kernel == 1 or dtype in (torch.bfloat16, torch.float16)
    assert (tuning.LIBRARY in seen) == expects_library


def test_the_nearest_recorded_rows_decide() -> None:
    small, large = {"BM": 1}, {"BM": 2}
    table = {PRODUCT.key: {1000: small, 4096: large}}
    for rows, expected in ((1000, small), (1400, small), (700, small), (3000, large), (5000, large), (2000, None)):
        assert tuning.nearest(table, replace(PRODUCT, rows=rows)) == expected
    assert tuning.nearest(table, replace(PRODUCT, n=640)) is None
    assert tuning.nearest(table, replace(PRODUCT, run=1)) is None


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    other = replace(PRODUCT, rows=64, activation="geglu", sources=2)
    measured = {PRODUCT: [({"BM": 64}, 0.5), (tuning.LIBRARY, 0.7)], other: [(tuning.LIBRARY, 0.1)]}
    path = tmp_path / "table.json"
    path.write_text(json.dumps(tuning.to_json(measured, {"device": "a GPU"})))
    expected = {PRODUCT.key: {4096: {"BM": 64}}, other.key: {64: tuning.LIBRARY}}
    assert tuning.read(path) == expected


@pytest.mark.parametrize("text", ["", "[]", '{"configs": [{"key": 1}]}', '{"configs": {"a": 1}}'])
def test_bad_tables(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is no table of tuned configurations"):
        tuning.read(path)


def test_all_recorded_tables_can_be_read() -> None:
    for path in tuning.FOLDER.glob("*.json"):
        assert tuning.read(path)


def test_the_rule_gives_tiles_whole_runs() -> None:
    for run in (1, 16, 64, 128):
        for rows in (64, 256, 4096, 1 << 18):
            config = tuning.by_rule(replace(PRODUCT, run=run, rows=rows), 132)
            assert config["BM"] % run == 0
            assert 1 <= config["SPLITS"] <= 16
