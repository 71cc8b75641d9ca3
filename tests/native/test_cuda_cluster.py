"""Sums that blocks share in a cluster: bits of those that go through scratch memory, where shares are the same, in one
launch."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch

from vpd_fast import _native
from vpd_fast.ops.statistics import Statistics

from ..ops.statistics_cases import assert_statistics
from .cuda_gemm_cases import FLOAT8, Case, check, make, prepare, run
from .devices import H200

INSTRUCTIONS = "wgmma_cluster"
# Blocks of a cluster by bytes of K, with many processors: a share has eight steps of 128 bytes.
BYTES = {2: 2048, 4: 4096, 8: 8192}


def case_of(blocks: int, dtype: torch.dtype, **options: object) -> Case:
    options = {"height": 37, "width": 1, "n": 72, "out_dtype": torch.bfloat16, **options}
    return Case(channels=(BYTES[blocks] // dtype.itemsize,), dtype=dtype, **options)


@pytest.mark.parametrize(
    ("blocks", "dtype", "options", "order"),
    [
        (2, torch.bfloat16, {"residual": torch.bfloat16}, 2),
        (2, torch.int8, {"height": 130, "n": 64, "activation": "geglu"}, 0),
        (2, FLOAT8, {"out_dtype": torch.float16}, 3),
        (4, torch.int8, {"activation": "relu", "pitch": 8}, 4),
        (4, torch.float16, {"out_dtype": torch.float32}, 1),
        (8, torch.bfloat16, {"height": 6, "width": 7, "batch": 2}, 5),
    ],
)
def test_bits_are_those_of_scratch_memory(cuda: ModuleType, blocks: int, dtype, options: dict, order: int) -> None:
    """Whatever the order of threads, copies and blocks."""
    case, device = case_of(blocks, dtype, **options), H200._replace(order=order)
    cuda.launches()
    expected = run(cuda, make(case), "wgmma_wide", device).clone()
    assert cuda.launches() == 2
    p = make(case)
    actual = run(cuda, p, INSTRUCTIONS, device)
    assert cuda.launches() == 1
    assert prepare(cuda, p, INSTRUCTIONS)[1].numel() == 0  # no scratch memory
    assert torch.equal(actual, expected)


def test_convolution_of_uneven_shares(cuda: ModuleType) -> None:
    """Shares that end within a tap, also of two sources, and a last one that is shorter."""
    for channels in ((144, 80), (336,)):
        case = Case(2, 5, 6, channels, 40, (3, 3), 1, (1, 1, 1, 1), torch.int8, out_dtype=torch.bfloat16)
        cuda.launches()
        check(cuda, case, INSTRUCTIONS)
        assert cuda.launches() == 1


@pytest.mark.parametrize(
    ("blocks", "run_length", "found"), [(2, 64, True), (4, 32, True), (4, 64, False), (8, 16, True)]
)
def test_statistics(cuda: ModuleType, blocks: int, run_length: int, found: bool) -> None:
    """Of runs that one block finishes."""
    case = case_of(blocks, torch.int8, height=8, width=16, run=run_length)
    p = make(replace(case, residual=torch.bfloat16))
    out = run(cuda, p, INSTRUCTIONS)
    assert prepare(cuda, p, INSTRUCTIONS)[0].finds_statistics(0) == found
    if found:
        assert_statistics(Statistics(p.statistics, run_length), out)
    else:
        assert p.statistics.isnan().all()


@pytest.mark.parametrize("change", [{"activation": "silu"}, {"n": 70}, {"residual": torch.float32}, {"pitch": 3}])
def test_what_goes_through_scratch_memory(cuda: ModuleType, change: dict) -> None:
    """Results that the wide epilogue does not finish."""
    cuda.launches()
    check(cuda, case_of(2, torch.bfloat16, **change), INSTRUCTIONS)
    assert cuda.launches() == 2


def test_enough_tiles_are_persistent(cuda: ModuleType) -> None:
    case = Case(1, 300, 1, (32,), 256, dtype=torch.bfloat16, out_dtype=torch.bfloat16)
    run(cuda, make(case), "wgmma_persistent", H200._replace(processors=2))
    shared = cuda.shared_bytes()
    run(cuda, make(case), INSTRUCTIONS, H200._replace(processors=2))
    assert shared == cuda.shared_bytes()


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_gpu(blocks: int, dtype: torch.dtype) -> None:
    """The bits of sums that go through scratch memory, three times."""
    case, cuda = case_of(blocks, dtype, residual=torch.bfloat16), _native.load("_C_cuda")
    expected = run(cuda, make(case), "wgmma_wide").clone()
    for _ in range(3):
        assert torch.equal(run(cuda, make(case), INSTRUCTIONS), expected)
