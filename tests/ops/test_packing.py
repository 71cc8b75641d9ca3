"""Packed weights and statistics are checked when they are made, and cannot be changed afterwards."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from vpd_fast.errors import InputError
from vpd_fast.ops import PackedWeight, Statistics, geglu_rows
from vpd_fast.ops.statistics import run_length

F32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
GOOD = PackedWeight.pack(torch.randn(2, 40, 6), INT8)


def changed(**changes: Any) -> PackedWeight:
    return dataclasses.replace(GOOD, **changes)


@pytest.mark.parametrize("dtype", [F32, BF16, INT8, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("rows", [False, True])
def test_layouts(dtype: torch.dtype, rows: bool) -> None:
    weight = PackedWeight.pack(torch.randn(2, 40, 6), dtype)
    data = weight.numbers().contiguous() if rows else weight.data
    again = PackedWeight(data, weight.scales, weight.weight_sums, 40, 6)
    assert torch.equal(again.unpack(), weight.unpack())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 10**7}, "weight 10000000x6 is stored as torch.int8 (2, 2, 2, 128)"),
        ({"n": 65}, "weight 65x6 is stored as"),
        ({"n": 0}, "n must be a positive integer, got 0"),
        ({"n": True}, "n must be a positive integer, got True"),
        ({"n": 40.0}, "n must be a positive integer, got 40.0"),
        ({"k": 9}, "weight 40x9 is stored as"),
        ({"k": "6"}, "k must be a positive integer, got '6'"),
        ({"data": GOOD.data[:, :1]}, "is stored as torch.int8 (2, 1, 2, 128)"),
        ({"data": GOOD.data[:0]}, "is stored as torch.int8 (0, 2, 2, 128)"),
        ({"data": GOOD.data.float()}, "is stored as torch.float32"),
        ({"data": GOOD.data.to(torch.int16)}, "is stored as torch.int16"),
        ({"data": GOOD.data.to_sparse()}, "data must be a dense tensor, got a tensor of layout torch.sparse_coo"),
        ({"data": None}, "data must be a dense tensor, got None"),
        ({"scales": None}, "only int8 or float8_e4m3fn must have scales"),
        ({"scales": GOOD.scales[:1]}, "scales of weight 40x6 must have shape (matrices=2, n=40), got (1, 40)"),
        ({"scales": GOOD.scales.double()}, "scales of weight 40x6 must be torch.float32, got torch.float64"),
        ({"scales": GOOD.scales.to("meta")}, "scales of weight 40x6 must be on cpu as data is, got meta"),
        ({"weight_sums": None}, "only int8 must have weight_sums"),
        ({"weight_sums": GOOD.weight_sums[:, :39]}, "weight_sums of weight 40x6 must have shape"),
        ({"weight_sums": [1.0]}, "weight_sums of weight 40x6 must be a tensor of shape"),
    ],
)
def test_weights_that_lie(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        changed(**changes)


@pytest.mark.parametrize("n", [10**7, 64, 33])
def test_float_weights_that_lie(n: int) -> None:
    with pytest.raises(InputError, match=f"weight {n}x16 is stored as"):
        PackedWeight(torch.randn(1, 1, 16, 32), None, None, n, 16)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(PackedWeight)])
def test_weights_are_frozen(name: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(GOOD, name, 1)


@pytest.mark.parametrize(
    ("weight", "dtype", "message"),
    [
        ([[[1.0]]], F32, "weight must be a dense tensor (matrices, n, k), got [[[...]]]"),
        (
            torch.zeros(1, 2, 3).to_sparse(),
            F32,
            "must be a dense tensor (matrices, n, k), got a tensor of layout",
        ),
        (torch.zeros(2, 3), F32, "weight must be a floating-point tensor (matrices, n, k), got (2, 3)"),
        (torch.zeros(1, 2, 3), "int8", "dtype must be float32, bfloat16, int8, float16 or float8_e4m3fn, got 'int8'"),
        (torch.zeros(1, 2, 3), torch.float64, "dtype must be float32, .* got torch.float64"),
        (torch.full((1, 2, 3), torch.nan), INT8, "weight has values that are not finite"),
        (torch.zeros(1, 2, 3, device="meta"), INT8, "weight has no values: it is on the meta device"),
    ],
)
def test_what_cannot_be_packed(weight: Any, dtype: Any, message: str) -> None:
    with pytest.raises(InputError, match=message if ".*" in message else re.escape(message)):
        PackedWeight.pack(weight, dtype)


@pytest.mark.parametrize("device", ["nowhere", 1.5, None])
def test_no_device(device: Any) -> None:
    with pytest.raises(InputError, match="device must be the name of a device"):
        GOOD.for_device(device)


@pytest.mark.parametrize("n", [0, -3, 2.0, "4", None])
def test_rows_of_geglu(n: Any) -> None:
    with pytest.raises(InputError, match="n must be a positive integer"):
        geglu_rows(n)


@pytest.mark.parametrize(
    ("data", "run", "message"),
    [
        (torch.zeros(1, 2, 5, 3), 0, "statistics.run must be a positive integer of at most"),
        (torch.zeros(1, 2, 5, 3), 2**70, "statistics.run must be a positive integer of at most"),
        (torch.zeros(1, 2, 5, 3), None, "statistics.run must be a positive integer of at most"),
        (torch.zeros(1, 2, 4, 3), 16, "statistics.data must have shape (B, runs, 5=5, C), got (1, 2, 4, 3)"),
        (torch.zeros(1, 2, 5, 3).double(), 16, "statistics.data must be torch.float32, got torch.float64"),
        (torch.zeros(1, 2, 3, 5).mT, 16, "statistics.data must be contiguous but for its first stride"),
        (None, 16, "statistics.data must be a tensor"),
    ],
)
def test_statistics_that_lie(data: Any, run: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Statistics(data, run)


@pytest.mark.parametrize(
    ("positions", "run"),
    [
        (1, 64),
        (64, 16),
        (100, 64),
        (256, 16),
        (1024, 32),
        (1040, 16),
        (4096, 64),
        (6400, 64),
        (16384, 128),
        (1 << 18, 128),
    ],
)
def test_runs_of_large_images_are_longer(positions: int, run: int) -> None:
    assert run_length(positions) == run


def test_statistics_are_frozen_and_can_be_taken_apart() -> None:
    statistics = Statistics(torch.zeros(1, 2, 5, 3), 16)
    data, run = statistics
    assert data is statistics.data
    assert run == 16
    with pytest.raises(dataclasses.FrozenInstanceError):
        statistics.run = 4  # type: ignore[misc]
