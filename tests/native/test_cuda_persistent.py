"""The persistent GEMM kernels: bits of the wide kernel's, whatever the order of threads and copies, in clusters of two.

Tests of clusters with few processors, so that each block has several tiles.
"""

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

INSTRUCTIONS = "wgmma_persistent"
FEW = H200._replace(processors=2)
STAGE_BYTES = {256: (128 + 256) * 128, 320: (256 + 160) * 128, 72: (256 + 128) * 128}  # by n, in these tests
dtypes = pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])


def same_as_wide(cuda: ModuleType, case: Case, order: int = 1, processors: int = 2) -> None:
    """The persistent kernel runs, and gives the bits of the wide one."""
    device = FEW._replace(order=order, processors=processors)
    actual = run(cuda, make(case), INSTRUCTIONS, device).clone()
    assert 3 * STAGE_BYTES[case.n] < cuda.shared_bytes() < 227 << 10
    assert cuda.shared_bytes() - 3 * STAGE_BYTES[case.n] >= 32 << 10  # where results wait for their stores
    assert torch.equal(actual, run(cuda, make(case), "wgmma_wide", device))


@dtypes
@pytest.mark.parametrize("n", [256, 320, 72])
@pytest.mark.parametrize("residual", [None, torch.bfloat16])
def test_convolution(cuda: ModuleType, dtype: torch.dtype, n: int, residual: torch.dtype | None) -> None:
    """Two sources, padding, tiles that leave the image, the batch and the columns, memory between the rows."""
    case = Case(3, 9, 18, (48, 16), n, (1, 3), 1, (0, 1, 0, 1), dtype=dtype, residual=residual, pitch=8)
    same_as_wide(cuda, replace(case, out_dtype=torch.bfloat16, activation="" if residual else "relu"))


@dtypes
@pytest.mark.parametrize("n", [256, 320, 72])
def test_matrix(cuda: ModuleType, dtype: torch.dtype, n: int) -> None:
    """More steps than stages; one row more than a tile has."""
    case = Case(1, 257, 1, (272 // dtype.itemsize,), n, dtype=dtype, out_dtype=torch.bfloat16, residual=torch.bfloat16)
    same_as_wide(cuda, case)
    check(cuda, case, INSTRUCTIONS, FEW)


@dtypes
def test_geglu(cuda: ModuleType, dtype: torch.dtype) -> None:
    same_as_wide(cuda, Case(1, 300, 1, (48,), 256, dtype=dtype, out_dtype=torch.bfloat16, activation="geglu"))


@dtypes
def test_strides_and_scales_of_images(cuda: ModuleType, dtype: torch.dtype) -> None:
    case = Case(2, 33, 17, (32,), 256, (3, 3), 2, (1, 1, 1, 1), dtype, out_dtype=torch.bfloat16, per_image=True)
    same_as_wide(cuda, case)


@pytest.mark.parametrize(("n", "order"), [(256, 0), (320, 2), (72, 3), (320, 4), (256, 5)])
def test_orders_of_threads_and_copies(cuda: ModuleType, n: int, order: int) -> None:
    """Two clusters with several tiles each, of which the last has one block without rows."""
    case = Case(5, 8, 16, (96,), n, (2, 1), 1, (1, 0, 0, 0), torch.bfloat16, residual=torch.bfloat16)
    same_as_wide(cuda, replace(case, out_dtype=torch.bfloat16), order, processors=4 if n == 320 else 2)


STATISTICS = [  # type, columns, positions of a run, height, width, batch, kernel; what a tile's rows are
    (torch.int8, 256, 64, 16, 16, 3, 3),  # lines of an image; several tiles of a block
    (torch.int8, 320, 128, 16, 16, 2, 1),
    (torch.int8, 72, 256, 16, 16, 3, 1),
    (torch.bfloat16, 320, 64, 8, 8, 9, 1),  # several images; the last tile of one block is beyond the batch
    (torch.bfloat16, 256, 128, 2, 256, 1, 1),  # a part of a line
    (torch.bfloat16, 72, 64, 16, 16, 3, 3),
    (torch.int8, 256, 16, 16, 16, 3, 3),  # several runs of what a warpgroup stores
    (torch.bfloat16, 320, 32, 8, 8, 9, 1),
    (torch.bfloat16, 72, 16, 8, 8, 9, 1),
]


@pytest.mark.parametrize(("dtype", "n", "length", "height", "width", "batch", "kernel"), STATISTICS)
def test_statistics(cuda: ModuleType, dtype, n: int, length: int, height: int, width: int, batch: int, kernel) -> None:
    """Those of the stored result, far from zero, whatever the order, and its bits with and without them."""
    margin, residual = kernel // 2, torch.bfloat16 if length == 64 else None
    case = Case(batch, height, width, (16,), n, (kernel, kernel), 1, (margin,) * 4, dtype, residual=residual)
    case, found = replace(case, out_dtype=torch.bfloat16), []
    for order, run_length in ((1, length), (2 + kernel, length), (1, 0)):
        p = make(replace(case, run=run_length))
        p.bias += 300
        found.append((run(cuda, p, INSTRUCTIONS, FEW._replace(order=order)).clone(), p.statistics))
        assert prepare(cuda, p, INSTRUCTIONS)[0].finds_statistics(0) == bool(run_length)
    assert_statistics(Statistics(found[0][1], length), found[0][0])
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][0], found[2][0])


def test_statistics_that_are_left_to_others(cuda: ModuleType) -> None:
    """Runs of less than 16 positions, of more than a tile has or of other rows, and geglu: nothing is written."""
    for change in (
        {"run": 8},
        {"run": 48},
        {"run": 64, "activation": "geglu"},
        {"run": 64, "height": 15, "width": 20},
    ):
        p = make(replace(Case(2, 16, 16, (32,), 256, dtype=torch.bfloat16, out_dtype=torch.bfloat16), **change))
        run(cuda, p, INSTRUCTIONS, FEW)
        assert not prepare(cuda, p, INSTRUCTIONS)[0].finds_statistics(0), change
        assert p.statistics.isnan().all()


@pytest.mark.parametrize(
    "change",
    [
        {"out_dtype": torch.float32},
        {"dtype": torch.float16},
        {"dtype": FLOAT8},
        {"residual": torch.float32},
        {"activation": "silu"},
        {"pitch": 4},
        {"n": 100},
        {"height": 20, "n": 128},
    ],
)
def test_what_is_left_to_the_wide_kernel(cuda: ModuleType, change: dict) -> None:
    """Other types, results that TMA cannot store, fewer tiles than processors."""
    case = replace(Case(1, 300, 1, (32,), 256, dtype=torch.bfloat16, out_dtype=torch.bfloat16), **change)
    check(cuda, case, INSTRUCTIONS, FEW)
    shared = cuda.shared_bytes()
    run(cuda, make(case), "wgmma_wide", FEW)
    assert shared == cuda.shared_bytes()


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("n", [256, 320, 72])
@pytest.mark.parametrize("convolution", [False, True])
def test_gpu(dtype: torch.dtype, n: int, convolution: bool) -> None:
    """The bits of the wide kernel, three times, with a tile and more for each of 132 multiprocessors."""
    case = Case(1, 132 * 256 + 1, 1, (272 // dtype.itemsize,), n, dtype=dtype, out_dtype=torch.bfloat16)
    if convolution:
        case = replace(case, batch=17, height=45, width=50, channels=(48, 16), kernel=(3, 3), padding=(1, 1, 1, 1))
    case, cuda = replace(case, residual=torch.bfloat16, pitch=8), _native.load("_C_cuda")
    expected = run(cuda, make(case), "wgmma_wide").clone()
    for _ in range(3):
        assert torch.equal(run(cuda, make(case), INSTRUCTIONS), expected)


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("n", [256, 320, 72])
def test_gpu_statistics(dtype: torch.dtype, n: int) -> None:
    case = Case(10, 64, 64, (64,), n, (3, 3), 1, (1, 1, 1, 1), dtype, out_dtype=torch.bfloat16, run=64)
    for _ in range(3):
        p = make(case)
        out = run(_native.load("_C_cuda"), p, INSTRUCTIONS)
        assert_statistics(Statistics(p.statistics, 64), out)
