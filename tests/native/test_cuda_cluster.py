"""Sums that blocks share in a cluster: bits of those that go through scratch memory, where shares are the same, in one
launch."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import ModuleType

import pytest
import torch

from vpd_fast import _native
from vpd_fast.ops.statistics import Statistics, run_length

from ..ops.statistics_cases import assert_statistics
from .cuda_gemm_cases import FLOAT8, Case, Problem, check, make, prepare, run
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


def test_statistics_of_small_images(cuda: ModuleType) -> None:
    """A cluster finishes 16 rows per block of an image of 8x8, which are positions that follow each other."""
    case = Case(1, 8, 8, (912,), 72, (3, 3), 1, (1, 1, 1, 1), torch.int8, out_dtype=torch.bfloat16, run=16)
    p = make(case)
    cuda.launches()
    out = run(cuda, p, INSTRUCTIONS)
    assert cuda.launches() == 1
    assert_statistics(Statistics(p.statistics, 16), out)


def empty(case: Case) -> Problem:
    """A problem that is planned, but not computed."""
    columns = case.kernel[0] * case.kernel[1] * sum(case.channels)
    vector, places = torch.empty(max(case.n, case.batch * case.height * case.width)), (case.batch, *case.sides)
    return Problem(
        case,
        [torch.empty(case.batch, case.height, case.width, channels, dtype=case.dtype) for channels in case.channels],
        torch.empty(case.n, columns, dtype=case.dtype),
        **(
            dict.fromkeys(("row_scales", "row_zeros", "column_scales", "sums"), vector)
            if case.dtype == torch.int8
            else {}
        ),
        out=torch.empty(*places, case.n, dtype=case.out_dtype),
        statistics=torch.empty(case.batch, case.sides[0] * case.sides[1] // case.run, 5, case.n),
    )


SIZES = {64: (320, 512), 32: (640,), 16: (1280,), 8: (1280,)}  # of the UNet and the encoder: channels by side


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_statistics_are_found_at_all_sizes_of_a_model(cuda: ModuleType, dtype: torch.dtype, batch: int) -> None:
    """Whatever shares sums and whatever does not. Nothing is computed."""
    for side, widths in SIZES.items():
        positions = side * side
        for n, (kernel, k) in product(widths, {3: (1, 2, 3), 1: (4, 5)}.items()):
            for channels in (n * times for times in k):
                case = Case(batch, side, side, (channels,), n, (kernel, kernel), 1, (kernel // 2,) * 4, dtype)
                case = replace(case, per_image=kernel > 1, out_dtype=torch.bfloat16, run=run_length(positions))
                assert prepare(cuda, empty(case), INSTRUCTIONS)[0].finds_statistics(0), case


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
