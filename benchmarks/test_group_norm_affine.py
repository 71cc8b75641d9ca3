"""group_norm_affine against GroupNorm, which also writes the normalised activations, and against their statistics."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import group_norm, silu

from vpd_fast import ops
from vpd_fast.bench.suites import CPU_DTYPES, DTYPES, on_devices, random_tensors, side_by_side, some_of, variants_of

CASES = {  # height and width, channels of the sources; 32 groups as everywhere in Stable Diffusion 1.5
    "512x512x128": (512, (128,)),
    "128x128x512": (128, (512,)),
    "64x64x320": (64, (320,)),
    "64x64x(640+320)": (64, (640, 320)),
    "32x32x640": (32, (640,)),
    "8x8x(1280+1280)": (8, (1280, 1280)),
}


@on_devices("dtype", CPU_DTYPES, DTYPES)
@pytest.mark.parametrize("case", some_of(CASES, ("128x128x512", "64x64x320")))
def test_side_by_side(case: str, dtype: str, device: str, keep: Callable) -> None:
    """PyTorch reads channels-last images too; its functions take one tensor, so joining two is part of its time."""
    side, channels = CASES[case]
    random = random_tensors(device)
    sources = [random(1, side, side, c).to(DTYPES[dtype]) for c in channels]
    x, x2 = (*sources, None)[:2]
    weight, bias = random(sum(channels)), random(sum(channels))
    like = weight.to(DTYPES[dtype]), bias.to(DTYPES[dtype])

    def joined() -> torch.Tensor:
        return (x if x2 is None else torch.cat(sources, -1)).permute(0, 3, 1, 2)

    def statistics() -> torch.Tensor:
        variance, mean = torch.var_mean(joined().float().unflatten(1, (32, -1)), dim=(2, 3, 4), correction=0)
        scale = weight.unflatten(0, (32, -1)) * (variance + 1e-5).rsqrt()[:, :, None]
        shift = bias.unflatten(0, (32, -1)) - mean[:, :, None] * scale
        return torch.stack([scale.flatten(1), shift.flatten(1)], 1)

    def normalised() -> torch.Tensor:
        return group_norm(joined(), 32, *like, 1e-5)

    variants = {"pytorch group_norm": normalised}
    if device == "cuda":  # our operators behind the statistics do while they read what PyTorch does in another pass
        variants["pytorch group_norm, silu"] = lambda: silu(normalised())
    variants["pytorch var_mean"] = statistics
    ours = variants_of(
        "group_norm_affine", device, lambda impl: ops.group_norm_affine(x, weight, bias, 32, 1e-5, x2, impl=impl), True
    )
    expected = statistics()
    # No time is reported for numbers that are not GroupNorm's. Means of up to 2^18 values of unit variance, added in
    # two orders, differ by about 2^9 roundings of 2^-24, which is 3e-5; normal weights are about 3 times that at most.
    for name, variant in ours.items():
        torch.testing.assert_close(variant(), expected, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    gigabytes = side * side * sum(channels) * DTYPES[dtype].itemsize / 1e9  # the activations, read once
    keep(side_by_side(variants | ours, device, seconds=5, gigabytes=gigabytes, case=case, dtype=dtype))
