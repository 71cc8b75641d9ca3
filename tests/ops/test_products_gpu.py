"""linear and conv2d by the kernels of a GPU, where there is one: the checks of test_linear.py and test_conv2d.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vpd_fast import ops
from vpd_fast.kernels import _gemm_cuda
from vpd_fast.ops.packing import FLOAT8, PackedWeight

from . import test_conv2d, test_linear
from .gemm_cases import make_weight, randn
from .statistics_cases import assert_statistics, empty_statistics

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
PRODUCTS = [  # the CUDA kernels once per kind of matrix instruction; mma does not multiply float8_e4m3fn
    (kernels, precision)
    for kernels in ("triton", "cuda:mma", "cuda:wgmma")
    for precision in (torch.bfloat16, torch.float16, torch.int8, FLOAT8)
    if (kernels, precision) != ("cuda:mma", FLOAT8)
]


def name_of(product: tuple[str, torch.dtype]) -> str:
    return f"{product[0]}-{str(product[1]).removeprefix('torch.')}"


@pytest.fixture(params=PRODUCTS, ids=name_of)
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, torch.dtype]:
    """Implementation and precision."""
    kernels, precision = request.param
    name, _, instructions = kernels.partition(":")
    if instructions.startswith("wgmma") and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only compute capability 9.0 has wgmma")
    if precision == FLOAT8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    if instructions:
        monkeypatch.setattr(_gemm_cuda, "INSTRUCTIONS", instructions)
    return name, precision


@pytest.fixture
def kernels(product: tuple[str, torch.dtype]) -> str:
    """Name of the implementation."""
    return product[0]


@pytest.fixture
def precision(product: tuple[str, torch.dtype]) -> torch.dtype:
    """Of the product."""
    return product[1]


def weight_of(n: int, k: int, dtype: torch.dtype) -> PackedWeight:
    return make_weight(n, k, dtype).for_device(DEVICE)


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return randn(*shape, dtype=dtype).to(DEVICE)


SIZES = [(1, 16, 1), (25, 48, 33), (130, 320, 64), (64, 5120, 1280), (1000, 656, 200), (4096, 320, 960)]


@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_linear_sizes(kernels: str, precision: torch.dtype, m: int, k: int, n: int) -> None:
    test_linear.check(kernels, tensor(2, m, k), weight_of(n, k, precision), tensor(n), exact_rows=True)


@pytest.mark.parametrize("parts", test_linear.PROLOGUES, ids="+".join)
@pytest.mark.parametrize("second", [0, 64])
def test_linear_prologue(kernels: str, precision: torch.dtype, parts: tuple[str, ...], second: int) -> None:
    k = 192 + second
    whole = {"norm": "layer", "affine": 1 + 0.3 * tensor(3, 2, k), "scale": 1 + tensor(k).abs()}
    x, x2 = 3 + 2 * tensor(3, 50, 192), tensor(3, 50, second) if second else None
    prologue = {name: whole[name] for name in parts}
    test_linear.check(kernels, x, weight_of(80, k, precision), tensor(80), x2=x2, **prologue)


@pytest.mark.parametrize("activation", [None, "relu", "silu", "geglu"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_activations(kernels: str, precision: torch.dtype, activation: str | None, out_dtype) -> None:
    for n in (64, 320):
        residual = tensor(2, 70, n // 2 if activation == "geglu" else n, dtype=torch.bfloat16)
        options = {"activation": activation, "residual": residual, "out_dtype": out_dtype, "exact_rows": True}
        test_linear.check(kernels, 4 * tensor(2, 70, 160), weight_of(n, 160, precision), tensor(n), **options)


CONVOLUTIONS = [  # height, width, channels of both sources, n, kernel, stride, padding
    (16, 16, (320, 0), 320, (3, 3), 1, 1),
    (64, 64, (64, 32), 128, (3, 3), 1, 1),
    (33, 31, (48, 0), 70, (3, 3), 2, (0, 0, 1, 1)),
    (8, 8, (1280, 640), 1280, (3, 3), 1, 1),
    (20, 15, (96, 0), 40, (2, 2), 1, (1, 0, 0, 1)),
    (7, 9, (32, 0), 24, (4, 1), 3, (2, 1, 0, 3)),
]


@pytest.mark.parametrize(("height", "width", "channels", "n", "kernel", "stride", "padding"), CONVOLUTIONS)
def test_conv2d_geometry(kernels, precision, height, width, channels, n, kernel, stride, padding) -> None:
    x, x2 = (tensor(2, height, width, c) if c else None for c in channels)
    weight = weight_of(n, kernel[0] * kernel[1] * sum(channels), precision)
    how = {"kernel": kernel, "stride": stride, "padding": padding, "x2": x2}
    test_conv2d.check(kernels, x, weight, tensor(n), exact_rows=True, **how)
    test_conv2d.check(kernels, x, weight, tensor(n), affine=tensor(2, 2, sum(channels)), silu=True, **how)


@pytest.mark.parametrize("product", [p for p in PRODUCTS if p[1].itemsize == 2], ids=name_of, indirect=True)
def test_sources_that_are_read_in_place(kernels: str, precision: torch.dtype) -> None:
    """Without a prologue, in the precision of the product: parts of wider tensors, aligned and not."""
    weight, how = weight_of(40, 9 * 96, precision), {"kernel": (3, 3), "padding": 1, "out_dtype": torch.float32}
    wide = tensor(2, 12, 10, 200, dtype=precision)
    for first in (0, 3):
        x, x2 = wide[..., first : first + 64], wide[..., 96 + first : 128 + first]
        test_conv2d.check(kernels, x, weight, tensor(40), x2=x2, **how)


def test_statistics_and_repetition(kernels: str, precision: torch.dtype) -> None:
    x, weight, results = tensor(2, 256, 640), weight_of(320, 640, precision), []
    for _ in range(3):
        statistics = empty_statistics(2, 256, 320)
        statistics = replace(statistics, data=statistics.data.to(DEVICE))
        results.append(ops.linear(x, weight, norm="layer", statistics=statistics, impl=kernels))
        assert_statistics(statistics, results[-1])
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_where_triton_and_cuda_must_agree_bit_by_bit() -> None:
    """Sums of int8 are exact and followed by the same operations."""
    x, weight, bias = tensor(2, 300, 320), weight_of(200, 320, torch.int8), tensor(200)
    first, second = (ops.linear(x, weight, None, norm="layer", impl=impl) for impl in ("triton", "cuda"))
    assert torch.equal(first, second)
    first, second = (ops.linear(x, weight, bias, norm="layer", impl=impl) for impl in ("triton", "cuda"))
    torch.testing.assert_close(first, second, rtol=2.0**-22, atol=1e-6)  # multiply-adds may be fused or not
