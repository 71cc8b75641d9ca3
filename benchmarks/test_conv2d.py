"""conv2d at the sizes of Stable Diffusion 1.5 that winograd_conv2d does not take, against oneDNN, on GPUs cuDNN.

They get an input that is joined, activated and, for 8 bits, rounded already, with one pixel of padding on all sides.
cuDNN computes in bfloat16 beside our 8 bits, because PyTorch has no 8-bit convolutions on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from vpd_fast import ops
from vpd_fast.bench import libraries
from vpd_fast.bench.suites import library_variant, on_devices, random_tensors, side_by_side, some_of, variants_of
from vpd_fast.ops.packing import PackedWeight

AROUND, LOWER_RIGHT = (1, 1, 1, 1), (0, 0, 1, 1)  # padding, elsewhere and in the encoder
CASES = {  # side of the input, channels of its sources, of the result, stride, padding, whether the input is activated
    "encoder, 512 to 256": (512, (128,), 128, 2, LOWER_RIGHT, False),
    "encoder, 256 to 128": (256, (256,), 256, 2, LOWER_RIGHT, False),
    "encoder, 128 to 64": (128, (512,), 512, 2, LOWER_RIGHT, False),
    "unet, 64 to 32": (64, (320,), 320, 2, AROUND, False),
    "unet, 32 to 16": (32, (640,), 640, 2, AROUND, False),
    "unet, 16 to 8": (16, (1280,), 1280, 2, AROUND, False),
    "first of the encoder": (512, (3,), 128, 1, AROUND, False),
    "first of the unet": (64, (4,), 320, 1, AROUND, False),
    "1280->1280 at 8": (8, (1280,), 1280, 1, AROUND, True),
    "1280+1280->1280 at 8": (8, (1280, 1280), 1280, 1, AROUND, True),
}
MAIN = "unet, 64 to 32"
TYPICAL = (MAIN, "1280->1280 at 8")


@on_devices("precision", libraries.PRECISIONS, libraries.GPU_PRECISIONS)
@pytest.mark.parametrize("case", some_of(CASES, TYPICAL))
def test_side_by_side(case: str, precision: str, device: str, keep: Callable) -> None:
    side, channels, n, stride, padding, active = CASES[case]
    dtype, k = libraries.activations(precision), sum(channels)
    random = random_tensors(device)
    sources = [random(1, side, side, c).to(dtype) for c in channels]
    kernel, bias = random(n, k, 3, 3) / (9 * k) ** 0.5, random(n)
    packed = PackedWeight.pack(kernel.permute(0, 2, 3, 1).flatten(1)[None], libraries.GPU_PRECISIONS[precision])
    weight, affine = packed.for_device(device), random(1, 2, k) * 0.5 + 1 if active else None
    joined = torch.cat(sources, -1).permute(0, 3, 1, 2)
    x, x2 = (*sources, None)[:2]
    how = {"x2": x2, "affine": affine, "silu": active, "kernel": (3, 3), "stride": stride, "padding": padding}

    # Three rows in float64.
    a = joined[:, :, : 2 * stride + 3].double()
    if affine is not None:
        a = F.silu(a * affine[:, 0, :, None, None].double() + affine[:, 1, :, None, None].double())
    top, left, bottom, right = padding
    exact = F.conv2d(F.pad(a, (left, right, top, bottom)), kernel.double(), bias.double(), stride=stride)[:, :, :3]

    ours = variants_of(
        "conv2d", device, lambda impl: ops.conv2d(x, weight, bias, impl=impl, **how), all_levels=case == MAIN
    )
    for variant in ours.values():
        libraries.require_parity(variant()[:, :3], exact.permute(0, 2, 3, 1), precision)
    _, library = libraries.NAMES[device]
    beside = library_variant(library, lambda: libraries.conv2d(joined, kernel, bias, stride, precision))
    facts = {"case": case, "precision": precision, "gflop": 2 * 9 * k * n * (side // stride) ** 2 / 1e9}
    keep(side_by_side(beside | ours, device, rounds=10, seconds=6, **facts))
