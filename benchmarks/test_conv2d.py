"""conv2d at the sizes of Stable Diffusion 1.5 that winograd_conv2d does not take, against oneDNN, on GPUs cuDNN.

They get an input that is joined, activated and, for 8 bits, rounded already, with one pixel of padding on all sides.
cuDNN computes in bfloat16 beside our 8 bits, because PyTorch has no 8-bit convolutions on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast import ops
from vpd_fast.bench import gpu_libraries, onednn
from vpd_fast.bench.statistics import rows_of
from vpd_fast.bench.suites import library_variant, on_devices, some_of, variants_of
from vpd_fast.bench.timing import measure
from vpd_fast.ops.packing import PackedWeight

LOWER_RIGHT = (0, 0, 1, 1)  # the encoder's padding
CASES = {  # side of the input, channels of its sources, of the result, stride, padding, whether the input is activated
    "encoder, 512 to 256": (512, (128,), 128, 2, LOWER_RIGHT, False),
    "encoder, 256 to 128": (256, (256,), 256, 2, LOWER_RIGHT, False),
    "encoder, 128 to 64": (128, (512,), 512, 2, LOWER_RIGHT, False),
    "unet, 64 to 32": (64, (320,), 320, 2, 1, False),
    "unet, 32 to 16": (32, (640,), 640, 2, 1, False),
    "unet, 16 to 8": (16, (1280,), 1280, 2, 1, False),
    "first of the encoder": (512, (3,), 128, 1, 1, False),
    "first of the unet": (64, (4,), 320, 1, 1, False),
    "1280->1280 at 8": (8, (1280,), 1280, 1, 1, True),
    "1280+1280->1280 at 8": (8, (1280, 1280), 1280, 1, 1, True),
}
MAIN = "unet, 64 to 32"
TYPICAL = (MAIN, "1280->1280 at 8")


def all_variants(case: str, precision: str, device: str) -> dict[str, Callable[[], Tensor]]:
    side, channels, n, stride, padding, active = CASES[case]
    dtype = gpu_libraries.activations(precision)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x, x2 = ([random(1, side, side, c).to(dtype) for c in channels] + [None])[:2]
    kernel, bias = random(n, sum(channels), 3, 3) / (9 * sum(channels)) ** 0.5, random(n)
    packed = PackedWeight.pack(kernel.permute(0, 2, 3, 1).flatten(1)[None], gpu_libraries.PRECISIONS[precision])
    weight = packed.for_device(device)
    affine = random(1, 2, sum(channels)) * 0.5 + 1 if active else None
    joined = torch.cat([t for t in (x, x2) if t is not None], -1).permute(0, 3, 1, 2)

    def native(impl: str) -> Tensor:
        how = {"kernel": (3, 3), "stride": stride, "padding": padding, "affine": affine, "silu": active}
        return ops.conv2d(x, weight, bias, x2=x2, impl=impl, **how)

    ours = variants_of("conv2d", device, native, all_levels=case == MAIN)
    exact = first_rows(joined, affine, kernel, bias, stride, padding)
    for variant in ours.values():
        onednn.require_parity(variant()[:, :3], exact, precision)
    name, library = ("onednn", onednn) if device == "cpu" else ("cudnn", gpu_libraries)
    return library_variant(name, lambda: library.conv2d(joined, kernel, bias, stride, precision)) | ours


def first_rows(
    x: Tensor,
    affine: Tensor | None,
    kernel: Tensor,
    bias: Tensor,
    stride: int,
    padding: int | tuple[int, ...],
) -> Tensor:
    """Three rows of the result in float64, channels last."""
    top, left, bottom, right = (padding,) * 4 if isinstance(padding, int) else padding
    a = x[:, :, : 2 * stride + 3].double()
    if affine is not None:
        a = F.silu(a * affine[:, 0, :, None, None].double() + affine[:, 1, :, None, None].double())
    padded = F.pad(a, (left, right, top, bottom))
    return F.conv2d(padded, kernel.double(), bias.double(), stride=stride)[:, :, :3].permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("device", "precision"), on_devices(onednn.PRECISIONS, gpu_libraries.PRECISIONS), indirect=["device"]
)
@pytest.mark.parametrize("case", some_of(CASES, TYPICAL))
def test_side_by_side(case: str, precision: str, device: str, keep: Callable) -> None:
    variants = all_variants(case, precision, device)
    side, channels, n, stride, _, _ = CASES[case]
    gflop = 2 * 9 * sum(channels) * n * (side // stride) ** 2 / 1e9
    facts = {"case": case, "precision": precision, "threads": torch.get_num_threads()}
    keep(rows_of(measure(variants, device, rounds=10, seconds=6), next(iter(variants)), gflop=gflop, **facts))
