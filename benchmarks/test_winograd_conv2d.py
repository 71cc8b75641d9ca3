"""winograd_conv2d at the sizes of Stable Diffusion 1.5, against oneDNN's direct convolution through PyTorch.

oneDNN gets an input that is joined, activated and, for 8 bits, rounded already, and adds no residual: its time is that
of the convolution alone. Rates count the arithmetic of a direct convolution, so they may exceed the machine's peak.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timing import measure, rows_of
from torch import Tensor

from vpd_fast import _native, ops
from vpd_fast.ops._packing import PackedWeight

CASES = {  # side of the input, channels of its sources, of the result, whether it is enlarged
    "128->128 at 512": (512, (128,), 128, False),
    "256->256 at 256": (256, (256,), 256, False),
    "512->512 at 128": (128, (512,), 512, False),
    "512->512 at 64": (64, (512,), 512, False),
    "320->320 at 64": (64, (320,), 320, False),
    "640+320->320 at 64": (64, (640, 320), 320, False),
    "640->640 at 32": (32, (640,), 640, False),
    "1280->1280 at 16": (16, (1280,), 1280, False),
    "1280+1280->1280 at 16": (16, (1280, 1280), 1280, False),
    "1280->1280 at 16, enlarged": (16, (1280,), 1280, True),
}
MAIN = "320->320 at 64"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
# Errors relative to float64: a few roundings of F(4x4) in float32; both factors of F(2x2) rounded to 16 or 8 bits.
MOST_ERROR = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 4e-2}


def variants_of(case: str, precision: str) -> dict[str, Callable[[], Tensor]]:
    """Full: SiLU of an affine input, bias and residual. The level of the machine; for the main case every level."""
    side, channels, n, upsample = CASES[case]
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    x, x2 = ([torch.randn(1, side, side, c, generator=generator).to(dtype) for c in channels] + [None])[:2]
    kernel = torch.randn(n, sum(channels), 3, 3, generator=generator) / (9 * sum(channels)) ** 0.5
    bias, zoom = torch.randn(n, generator=generator), 2 if upsample else 1
    residual = torch.randn(1, side * zoom, side * zoom, n, generator=generator).to(dtype)
    affine = torch.randn(1, 2, sum(channels), generator=generator) * 0.5 + 1
    taps = 9 if upsample else 36 if precision == "float32" else 16
    weight = PackedWeight.pack(ops.winograd_weight(kernel, taps), PRECISIONS[precision])

    def native(isa: str, **options: Tensor | bool) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VPD_FAST_ISA", isa)
            return ops.winograd_conv2d(x, weight, bias, x2=x2, upsample=upsample, impl="cpu", **options)

    joined = torch.cat([t for t in (x, x2) if t is not None], -1).permute(0, 3, 1, 2)
    joined = F.interpolate(joined.float(), scale_factor=2).to(joined) if upsample else joined
    require_parity(native(_native.isa()), joined, kernel, bias, MOST_ERROR[precision])
    full = {"affine": affine, "silu": True, "residual": residual}
    levels = _native.load("_C").usable_isas()
    return {
        "onednn": direct(joined.contiguous(memory_format=torch.channels_last), kernel, bias, precision),
        "cpu": lambda: native(levels[-1]),
        **{f"cpu full {i}": lambda i=i: native(i, **full) for i in (levels if case == MAIN else levels[-1:])},
    }


def direct(x: Tensor, kernel: Tensor, bias: Tensor, precision: str) -> Callable[[], Tensor]:
    """oneDNN's convolution of an input of that precision."""
    if precision != "int8":
        packed = kernel.to(x).contiguous(memory_format=torch.channels_last)
        return lambda: F.conv2d(x, packed, bias.to(x), padding=1)
    ones = [1, 1]
    numbers = torch.randint(0, 256, x.shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    scales = kernel.abs().amax((1, 2, 3)) / 127
    whole = (kernel / scales[:, None, None, None]).round().to(torch.int8)
    packed = torch.ops.onednn.qconv_prepack(whole, scales, 0.01, 128, ones, ones, ones, 1, list(x.shape))
    zeros = torch.zeros(len(bias), dtype=torch.int32)
    geometry = (ones, ones, ones, 1)
    return lambda: torch.ops.onednn.qconv_pointwise(
        *(numbers, 0.01, 128, packed, scales, zeros, bias, *geometry, 1.0, 0, torch.bfloat16, "none", [], "")
    )


def require_parity(actual: Tensor, x: Tensor, kernel: Tensor, bias: Tensor, limit: float) -> None:
    """No time is reported unless the first rows are within the limit of float64."""
    rows = slice(0, 6)
    exact = F.conv2d(x[:, :, :7].double(), kernel.double(), bias.double(), padding=1)[:, :, rows].permute(0, 2, 3, 1)
    error = ((actual[:, rows].double() - exact).norm() / exact.norm()).item()
    assert error <= limit, f"error {error:.1e}, allowed are {limit:.1e}"


@pytest.mark.parametrize("precision", list(PRECISIONS))
@pytest.mark.parametrize("case", list(CASES))
def test_side_by_side(case: str, precision: str, device: str, keep: Callable) -> None:
    if device != "cpu":
        pytest.skip("winograd_conv2d has a CPU kernel only")
    variants = variants_of(case, precision)
    side, channels, n, upsample = CASES[case]
    gflop = 2 * 9 * sum(channels) * n * (side * (2 if upsample else 1)) ** 2 / 1e9
    facts = {"case": case, "precision": precision, "threads": torch.get_num_threads()}
    keep(rows_of(measure(variants, device, rounds=10, seconds=8), "onednn", gflop=gflop, **facts))
