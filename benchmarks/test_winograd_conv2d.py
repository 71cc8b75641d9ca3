"""winograd_conv2d at the sizes of Stable Diffusion 1.5, against oneDNN's direct convolution through PyTorch.

oneDNN gets an input that is joined, activated and, for 8 bits, rounded already, and adds no residual: its time is that
of the convolution alone. Rates count the arithmetic of a direct convolution, so they may exceed the machine's peak.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast import ops
from vpd_fast.bench import libraries
from vpd_fast.bench.suites import on_devices, random_tensors, side_by_side, some_of, variants_of
from vpd_fast.ops.packing import PackedWeight

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
TYPICAL = (MAIN, "1280->1280 at 16")


# CPUs are the only devices that it has a kernel for.
@on_devices("precision", libraries.PRECISIONS, ())
@pytest.mark.parametrize("case", some_of(CASES, TYPICAL))
def test_side_by_side(case: str, precision: str, device: str, keep: Callable) -> None:
    """Full: SiLU of an affine input, bias and residual. The level of the machine; for the main case every level."""
    side, channels, n, upsample = CASES[case]
    dtype, k, high = libraries.activations(precision), sum(channels), side * (2 if upsample else 1)
    random = random_tensors(device)
    sources = [random(1, side, side, c).to(dtype) for c in channels]
    kernel, bias = random(n, k, 3, 3) / (9 * k) ** 0.5, random(n)
    full = {"residual": random(1, high, high, n).to(dtype), "affine": random(1, 2, k) * 0.5 + 1, "silu": True}
    matrices = 9 if upsample else 36 if precision == "float32" else 16
    weight = PackedWeight.pack(ops.winograd_weight(kernel, matrices), libraries.PRECISIONS[precision])
    x, x2 = (*sources, None)[:2]

    def native(impl: str, **options: Tensor | bool) -> Tensor:
        return ops.winograd_conv2d(x, weight, bias, x2=x2, upsample=upsample, impl=impl, **options)

    joined = torch.cat(sources, -1).permute(0, 3, 1, 2)
    joined = F.interpolate(joined.float(), scale_factor=2).to(joined) if upsample else joined
    rows = slice(0, 6)
    exact = F.conv2d(joined[:, :, :7].double(), kernel.double(), bias.double(), padding=1)[:, :, rows]
    libraries.require_parity(native("cpu")[:, rows], exact.permute(0, 2, 3, 1), precision)
    ours = variants_of("winograd_conv2d", "cpu", lambda impl: native(impl, **full), all_levels=case == MAIN)
    variants = {
        "onednn": libraries.conv2d(joined, kernel, bias, 1, precision),
        "cpu": lambda: native("cpu"),
        **{name.replace("cpu", "cpu full"): variant for name, variant in ours.items()},
    }
    facts = {"case": case, "precision": precision, "gflop": 2 * 9 * k * n * high**2 / 1e9}
    keep(side_by_side(variants, device, rounds=10, seconds=8, **facts))
