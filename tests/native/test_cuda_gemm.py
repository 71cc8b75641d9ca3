"""The CUDA GEMM kernels: compiled for the CPU over an emulation (tests/native/cuda_emulation), and on a GPU.

Tensors lie in poisoned memory and begin as poison, and products of 8 bits must be exact.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch

from vpd_fast import _native
from vpd_fast.ops.rounding import round_columns
from vpd_fast.ops.statistics import Statistics

from ..ops.statistics_cases import assert_statistics
from .cuda_gemm_cases import FLOAT8, Case, before_activation, check, make, name_of, prepare, run
from .devices import A100, H200, L40, Device

MMA = [("mma", A100)]
WGMMA = [("wgmma", H200), ("wgmma_wide", H200)]
PATHS = [*MMA, *WGMMA]
DTYPES = [torch.int8, torch.bfloat16, torch.float16, FLOAT8]
ALL = [(path, dtype) for path in PATHS for dtype in DTYPES if path[0] != "mma" or dtype != FLOAT8]
paths = pytest.mark.parametrize(("instructions", "device"), PATHS, ids=[path[0] for path in PATHS])
paths_and_dtypes = pytest.mark.parametrize(
    ("path", "dtype"), ALL, ids=[f"{path[0]}-{name_of(dtype)}" for path, dtype in ALL]
)
Path = tuple[str, Device]


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> ModuleType:
    """The module that runs the kernels. A GPU has its own number of processors, whatever a test says."""
    return request.getfixturevalue("cuda") if request.param == "emulated" else _native.load("_C_cuda")


@paths_and_dtypes
@pytest.mark.parametrize(
    ("rows", "channels", "n"), [(1, 16, 1), (64, 128, 64), (65, 48, 33), (130, 272, 70), (127, 640, 130)]
)
def test_sizes(machine: ModuleType, path: Path, dtype: torch.dtype, rows: int, channels: int, n: int) -> None:
    check(machine, Case(height=rows, width=1, channels=(channels,), n=n, dtype=dtype), *path)


@paths_and_dtypes
def test_large_tiles(machine: ModuleType, path: Path, dtype: torch.dtype) -> None:
    """With few multiprocessors tiles are larger, and none shares its sums."""
    case = Case(batch=2, height=9, width=19, channels=(144,), n=200, kernel=(2, 1), dtype=dtype)
    check(machine, case, path[0], path[1]._replace(processors=2))


GEOMETRIES = [  # height, width, kernel, stride, padding
    (6, 7, (3, 3), 1, (1, 1, 1, 1)),
    (9, 7, (3, 3), 2, (0, 0, 1, 1)),
    (17, 18, (3, 3), 1, (0, 0, 0, 0)),
    (5, 1, (3, 3), 3, (1, 1, 1, 1)),
    (7, 9, (4, 1), 3, (2, 1, 0, 3)),
    (2, 3, (1, 5), 1, (0, 4, 0, 4)),
    (4, 5, (1, 1), 2, (1, 0, 0, 2)),
]


@paths_and_dtypes
@pytest.mark.parametrize(("height", "width", "kernel", "stride", "padding"), GEOMETRIES)
def test_geometry(machine: ModuleType, path: Path, height, width, kernel, stride, padding, dtype: torch.dtype) -> None:
    how = {"kernel": kernel, "stride": stride, "padding": padding, "pitch": 3, "batch": 3}
    check(machine, Case(height=height, width=width, channels=(80,), n=24, dtype=dtype, **how), *path)


@paths_and_dtypes
@pytest.mark.parametrize("channels", [(16, 16), (48, 160), (272, 32)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)])
def test_two_sources(machine: ModuleType, path: Path, channels, kernel, dtype: torch.dtype) -> None:
    padding = (1, 1, 1, 0) if kernel != (1, 1) else (0, 0, 0, 0)
    check(machine, Case(channels=channels, kernel=kernel, padding=padding, dtype=dtype, pitch=1), *path)


@paths_and_dtypes
@pytest.mark.parametrize("activation", ["", "relu", "silu", "geglu"])
@pytest.mark.parametrize(
    ("residual", "out_dtype", "pitch"),
    [
        (None, torch.float32, 0),
        (torch.float32, torch.float32, 4),
        (torch.bfloat16, torch.bfloat16, 4),
        (torch.float16, torch.float16, 0),
        (torch.float32, torch.bfloat16, 1),
        (torch.bfloat16, torch.float32, 2),
    ],
)
def test_epilogue(machine: ModuleType, path: Path, dtype, activation, residual, out_dtype, pitch) -> None:
    """Rows of the result that begin at multiples of 16 bytes and others; columns that are no multiple of 4."""
    case = Case(activation=activation, residual=residual, out_dtype=out_dtype, pitch=pitch, dtype=dtype, batch=2)
    for n in (32, 160) if activation == "geglu" else (37, 72):
        for bias in (True, False):
            check(machine, replace(case, n=n, bias=bias), *path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("activation", "residual", "out_dtype"),
    [
        ("", None, torch.bfloat16),
        ("", torch.float16, torch.float16),
        ("relu", torch.float32, torch.float32),
        ("geglu", None, torch.bfloat16),
        ("geglu", None, torch.float32),
    ],
)
def test_the_wide_epilogue_gives_the_same_bits(machine: ModuleType, dtype, activation, residual, out_dtype) -> None:
    """Of tiles of 64, of 128 columns, of which the last has fewer, and of 160; it is not the same kernel."""
    case = Case(activation=activation, residual=residual, out_dtype=out_dtype, dtype=dtype, batch=2, pitch=8)
    for n, device in ((96, H200), (352, H200._replace(processors=2)), (320, H200._replace(processors=2))):
        results, shared = [], []
        for instructions in ("wgmma", "wgmma_wide"):
            results.append(run(machine, make(replace(case, n=n)), instructions, device))
            if hasattr(machine, "shared_bytes"):
                shared.append(machine.shared_bytes())
        assert torch.equal(*results)
        assert not shared or shared[0] != shared[1]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["", "geglu"])
def test_tiles_of_160_columns(machine: ModuleType, dtype: torch.dtype, activation: str) -> None:
    """Where they end earlier than narrower ones: in one round of the processors, or in one whose sums are shared."""
    case = Case(height=8, width=8, channels=(560, 496), n=320, kernel=(2, 1), padding=(1, 0, 0, 0), dtype=dtype)
    case = replace(case, activation=activation, out_dtype=torch.bfloat16)
    for processors, launches in ((2, 1), (4, 2)):
        check(machine, case, "wgmma_wide", H200._replace(processors=processors))
        if hasattr(machine, "launches"):
            machine.launches()
            run(machine, make(case), "wgmma_wide", H200._replace(processors=processors))
            assert machine.launches() == launches
    if hasattr(machine, "shared_bytes"):
        run(machine, make(case), "wgmma_wide", H200._replace(processors=2))
        assert machine.shared_bytes() > 5 * (128 + 160) * 128  # of five stages of such tiles


@paths_and_dtypes
@pytest.mark.parametrize("activation", ["", "relu", "silu", "geglu"])
@pytest.mark.parametrize(("residual", "pitch", "channels"), [(None, 0, 48), (torch.bfloat16, 3, 48), (None, 8, 1056)])
def test_results_of_8_bits(machine: ModuleType, path: Path, dtype, activation, residual, pitch, channels) -> None:
    """They are those of float32, rounded; also of sums that blocks share."""
    case = Case(activation=activation, residual=residual, pitch=pitch, dtype=dtype, batch=2, channels=(channels,))
    for n, processors in ((32, 132), (160, 2)) if activation == "geglu" else ((37, 132), (72, 132), (320, 2)):
        rounded, device = make(replace(case, n=n, rounded_result=True)), path[1]._replace(processors=processors)
        actual = run(machine, rounded, path[0], device)
        numbers = make(replace(case, n=n))
        assert rounded.rounding is not None
        expected = round_columns(run(machine, replace(numbers, bias=rounded.bias), path[0], device), rounded.rounding)
        assert torch.equal(actual, expected)


def test_results_of_8_bits_by_the_wide_epilogue(cuda: ModuleType) -> None:
    """It is another kernel than that of four columns per thread; what it leaves to that one is right, too."""
    case = Case(activation="geglu", batch=2, n=320, height=16, width=16, rounded_rows=True, rounded_result=True)
    device, shared, results = H200._replace(processors=2), [], []
    for instructions in ("wgmma", "wgmma_wide"):
        results.append(run(cuda, make(case), instructions, device))
        shared.append(cuda.shared_bytes())
    assert shared[0] != shared[1]
    p = make(case)
    assert p.rounding is not None
    p.rounding = torch.zeros(2, 161)[:, 1:].copy_(p.rounding)  # at no multiple of 16 bytes
    results.append(run(cuda, p, "wgmma_wide", device))
    assert cuda.shared_bytes() != shared[1]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@paths
@pytest.mark.parametrize("activation", ["", "geglu"])
def test_rows_that_were_rounded_before(machine: ModuleType, instructions: str, device: Device, activation: str) -> None:
    """They have neither scales nor zeros; of two sources, and of sums that blocks share."""
    for channels, n in (((48, 32), 64), ((560, 496), 320)):
        case = Case(channels=channels, n=n, activation=activation, rounded_rows=True, residual=torch.bfloat16)
        check(machine, case, instructions, device)


def test_results_of_8_bits_saturate(machine: ModuleType) -> None:
    p = make(Case(dtype=torch.bfloat16, n=40, height=4, width=1, rounded_result=True, bias=False))
    assert p.rounding is not None
    p.rounding[0], p.rounding[1] = 1e30, 0.0
    p.sources[0][0, 0], p.weight[:, 0] = 0.0, 1.0
    p.sources[0][0, 0, 0, 0], p.sources[0][0, 1, 0, 0] = 1.0, float("nan")
    for instructions, device in PATHS:
        out = run(machine, p, instructions, device).view(4, 40)
        assert (out[0] == 127).all()
        assert (out[1] == -128).all()


STATISTICS = [  # positions of a run, height, width, batch, kernel; what a tile's rows are
    (64, 16, 16, 2, 3),  # eight lines of an image
    (64, 8, 8, 3, 3),  # two images, of which the last is missing
    (128, 4, 32, 1, 1),  # positions of a matrix
    (32, 4, 8, 5, 1),  # of several images
    (128, 2, 256, 1, 3),  # half a line
    (16, 6, 16, 1, 3),  # more lines than the image has
    (16, 6, 8, 1, 3),  # lines of which two are a run
]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize(("length", "height", "width", "batch", "kernel"), STATISTICS)
def test_statistics(machine: ModuleType, dtype, length: int, height: int, width: int, batch: int, kernel: int) -> None:
    """Those of the stored result, of tiles of 64, 128 and 160 columns; numbers far from zero."""
    margin = kernel // 2
    case = Case(batch, height, width, (32,), kernel=(kernel, kernel), padding=(margin,) * 4, dtype=dtype, run=length)
    wide = {"n": 320, "residual": torch.bfloat16, "out_dtype": torch.bfloat16}
    for options, processors in (({"n": 72}, 1), ({"n": 136, "activation": "relu"}, 1), (wide, 2)):
        p = make(replace(case, **options))
        p.bias += 300
        device = H200._replace(processors=processors)
        out = run(machine, p, "wgmma_wide", device)
        if hasattr(machine, "configure"):  # a GPU shares the sums of so few tiles, and leaves statistics to others
            assert prepare(machine, p, "wgmma_wide")[0].finds_statistics(0)
        if not p.statistics.isnan().all():
            assert_statistics(Statistics(p.statistics, length), out)


def test_statistics_that_are_left_to_others(cuda: ModuleType) -> None:
    """Runs that are no tile's rows, sums that blocks share, geglu, and other kernels: nothing is written."""
    for change, instructions, processors in (
        ({"height": 8, "width": 6, "run": 16, "kernel": (3, 3), "padding": (1, 1, 1, 1)}, "wgmma_wide", 2),
        ({"height": 5, "width": 7, "run": 64}, "wgmma_wide", 2),
        ({"height": 8, "width": 8, "run": 64, "channels": (2048,)}, "wgmma_wide", 132),
        ({"height": 8, "width": 8, "run": 64, "n": 64, "activation": "geglu"}, "wgmma_wide", 2),
        ({"height": 8, "width": 8, "run": 64}, "wgmma", 2),
        ({"height": 8, "width": 8, "run": 64}, "mma", 2),
    ):
        p = make(Case(**{"n": 72, **change}))
        run(cuda, p, instructions, H200._replace(processors=processors))
        assert not prepare(cuda, p, instructions)[0].finds_statistics(0), change
        assert p.statistics.isnan().all()


def test_statistics_of_numbers_that_are_not_finite(machine: ModuleType) -> None:
    """What is not finite makes the mean of its run so; least and largest leave NaN out."""
    p = make(Case(height=8, width=16, channels=(32,), n=72, dtype=torch.bfloat16, run=64))
    p.sources[0][0, 1, 3, 2], p.sources[0][0, 5, 1, 7] = float("nan"), float("inf")
    out = run(machine, p, "wgmma_wide", H200._replace(processors=1)).view(2, 64, 72)
    mean, _, squares, low, high = p.statistics[0].unbind(1)
    assert mean[0].isnan().all()
    assert not mean[1].isfinite().any()
    assert not squares.isfinite().any()
    assert torch.equal(low[0], out[0].nan_to_num(torch.inf).amin(0))
    assert torch.equal(high[0], out[0].nan_to_num(-torch.inf).amax(0))
    assert (low[1] <= high[1]).all()


@paths_and_dtypes
@pytest.mark.parametrize("activation", ["", "geglu"])
@pytest.mark.parametrize("n", [64, 31])
def test_sums_shared_by_blocks(machine: ModuleType, path: Path, dtype, activation: str, n: int) -> None:
    """8 x 8 positions and long sums, as in the lowest level of the UNet."""
    if activation and n % 32:
        n = 96
    case = Case(height=8, width=8, channels=(560, 496), n=n, kernel=(2, 1), padding=(1, 0, 0, 0), dtype=dtype)
    case = replace(case, activation=activation, residual=torch.bfloat16, out_dtype=torch.bfloat16)
    check(machine, case, *path)
    if hasattr(machine, "launches"):
        machine.launches()
        run(machine, make(case), *path)
        assert machine.launches() == 2


@paths
def test_a_scale_for_each_image(machine: ModuleType, instructions: str, device: Device) -> None:
    case = Case(batch=3, height=6, width=5, channels=(32,), kernel=(3, 3), per_image=True)
    for dtype in (torch.int8,) if instructions == "mma" else (torch.int8, FLOAT8):
        check(machine, replace(case, dtype=dtype), instructions, device)
        check(machine, replace(case, dtype=dtype, kernel=(1, 1), channels=(512, 640)), instructions, device)


@paths
def test_the_largest_sums_of_8_bits(machine: ModuleType, instructions: str, device: Device) -> None:
    """65536 products of the largest numbers stay within int32, with and without blocks that share them."""
    p = make(Case(height=2, width=1, channels=(32768, 32768), n=2, bias=False))
    for source in p.sources:
        source.fill_(-128)
    p.weight.fill_(127)
    p.weight[1] = -127
    p.sums, p.row_zeros = p.weight.sum(1, dtype=torch.int32).float(), torch.tensor([127.0, 0.0])
    p.row_scales.fill_(1), p.column_scales.fill_(1)
    for processors in (1, 132):
        actual = run(machine, p, instructions, device._replace(processors=processors))
        sums = torch.tensor([[-255.0, -128.0]]).T.double() * torch.tensor([[127.0, -127.0]]).double() * 65536
        assert torch.equal(actual.view(2, 2), sums.float())


def test_sums_of_float8_move_to_float32(machine: ModuleType) -> None:
    """4096 products of one sign, which tensor cores alone would add up with an error of 9 %.

    They add 32 products at a time to a sum, and cut each of the 33 numbers off at 2^-13 of the largest, which is at
    most the sum of 128 columns so far: 4 * 33 * 2^-13 = 1.6 % of it is the most that can be lost.
    """
    p = make(Case(dtype=FLOAT8, channels=(4096,), n=16, bias=False))
    generator = torch.Generator().manual_seed(0)
    for numbers in (p.sources[0], p.weight):
        numbers.copy_(0.1 + torch.rand(numbers.shape, generator=generator))
    p.row_scales.fill_(1), p.column_scales.fill_(1)
    exact = p.sources[0].double() @ p.weight.double().T
    for processors in (1, 132):
        actual = run(machine, p, "wgmma", H200._replace(processors=processors))
        lost = 1 - actual.double() / exact
        assert 0 < lost.max() <= 4 * 33 * 2.0**-13


@paths_and_dtypes
def test_orders_of_threads_and_copies_do_not_change_a_bit(machine: ModuleType, path: Path, dtype) -> None:
    case = Case(batch=2, height=9, width=8, channels=(336, 80), n=72, kernel=(1, 3), padding=(0, 1, 0, 1), dtype=dtype)
    results = [run(machine, make(case), path[0], path[1]._replace(order=order)).clone() for order in range(5)]
    assert all(torch.equal(results[0], other) for other in results[1:])


@paths
@pytest.mark.parametrize("activation", ["", "relu", "silu"])
def test_what_is_not_finite_stays_in_its_rows(
    machine: ModuleType, instructions: str, device: Device, activation: str
) -> None:
    case = Case(dtype=torch.bfloat16, height=6, width=6, kernel=(3, 3), padding=(1, 1, 1, 1), activation=activation)
    p = make(case)
    expected = run(machine, p, instructions, device).clone()
    p.sources[0][0, 2, 3, 5] = float("nan")
    actual = run(machine, p, instructions, device)
    assert actual[0, 1:4, 2:5].isnan().all()
    actual[0, 1:4, 2:5] = expected[0, 1:4, 2:5]
    assert torch.equal(actual, expected)


@paths
def test_empty(machine: ModuleType, instructions: str, device: Device) -> None:
    if hasattr(machine, "launches"):
        machine.launches()
    run(machine, make(Case(batch=0)), instructions, device)
    assert not hasattr(machine, "launches") or machine.launches() == 0


def test_devices_with_less_shared_memory(cuda: ModuleType) -> None:
    for processors in (1, 142):
        check(cuda, Case(height=70, width=2, channels=(160,), n=130), "mma", L40._replace(processors=processors))


@pytest.mark.parametrize(
    ("change", "instructions", "device", "message"),
    [
        ({"channels": (40,)}, "auto", H200, "channels of a source are no multiple of 16 bytes"),
        ({"channels": (16, 8)}, "auto", A100, "channels of a source are no multiple of 16 bytes"),
        ({"n": 48, "activation": "geglu"}, "auto", A100, "no runs of 16"),
        ({"dtype": FLOAT8}, "auto", A100, "no wgmma"),
        ({"dtype": FLOAT8}, "mma", H200, "does not multiply float8_e4m3fn"),
        ({}, "wgmma", A100, "no wgmma"),
        ({}, "mma", Device(major=7), "older than compute capability 8.0"),
    ],
)
def test_what_it_cannot_run(cuda: ModuleType, change: dict, instructions: str, device: Device, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(cuda, make(replace(Case(), **change)), instructions, device)


def test_tensors_that_are_not_aligned(cuda: ModuleType) -> None:
    p = make(Case(channels=(64,)))
    p.sources[0] = p.sources[0][..., 8:56]
    with pytest.raises(ValueError, match="address of a source is no multiple of 16 bytes"):
        run(cuda, p, "mma", A100)
    p.sources[0] = torch.zeros(1, 5, 7, 56, dtype=torch.int8)[..., :48]
    with pytest.raises(ValueError, match="stride of a source is no multiple of 16 bytes"):
        run(cuda, p, "mma", A100)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"batch": 3}, "share memory"), ({"stride": 9, "height": 30, "width": 30}, "stride of the convolution")],
)
def test_what_tma_cannot_read_is_computed_by_mma(cuda: ModuleType, change: dict, message: str) -> None:
    """An image for the whole batch, and a convolution of a stride beyond TMA's."""
    p = make(Case(kernel=(2, 2), **change))
    p.sources[0] = p.sources[0][:1].expand(p.case.batch, -1, -1, -1)
    with pytest.raises(ValueError, match=message):
        run(cuda, p, "wgmma")
    assert torch.equal(run(cuda, p, "auto"), before_activation(p))


@pytest.mark.parametrize("sizes", [{"height": 1 << 30}, {"batch": 1 << 20, "height": 1 << 11}, {"n": 1 << 31}])
def test_sizes_whose_offsets_would_overflow(cuda: ModuleType, sizes: dict) -> None:
    cuda.configure(*A100)
    case = {"batch": 1, "height": 4, "width": 4, "n": 8} | sizes
    shape = (case["batch"], case["height"], case["width"], case["height"], case["width"])
    image = (0, "bfloat16", (16, 16, 16))
    sources, addresses = [(0, (16, 16, 16), 16)], (0, 0, 0, 0)
    arguments = "bfloat16", shape, (1, 1, 1, 0, 0), 0, case["n"], addresses, False, 0, "", None, image, "auto"
    product = cuda.Gemm(sources, *arguments)
    with pytest.raises(ValueError, match=r"too large|too many"):
        product.scratch(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"activation": "gelu"}, "gelu"),
        ({"out_dtype": torch.float64}, "float64"),
    ],
)
def test_unknown_names_are_refused(cuda: ModuleType, change: dict, message: str) -> None:
    p = make(Case(activation="", dtype=torch.bfloat16))
    p.case = replace(p.case, **change)
    if "out_dtype" in change:
        p.out = p.out.double()
    with pytest.raises(ValueError, match=message):
        run(cuda, p, "auto")
    with pytest.raises(ValueError, match="fastest"):
        run(cuda, make(Case()), "fastest")
