"""upsample_argmax and upsample_argmax_windows against interpolate + argmax.

Logits are of two kinds, because the kernel's time depends on them: `smooth` is like a network's output (regions in
which few channels compete), `noise` is the worst case (independent values, hardly any channel is ruled out early).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import interpolate

from vpd_fast import ops
from vpd_fast.bench.suites import side_by_side, some_of, variants_of

CASES = {  # batch, channels, (h, w), (H, W)
    "150x64x64 to 512x512": (1, 150, (64, 64), (512, 512)),
    "150x128x128 to 512x512": (1, 150, (128, 128), (512, 512)),
    "8x150x64x64 to 512x512": (8, 150, (64, 64), (512, 512)),
    "2x120x120 to 480x480": (1, 2, (120, 120), (480, 480)),
}
WINDOWS = {  # channels, (ys, xs), crop, image, size
    "512x683 in two windows": (150, ([0], [0, 171]), (512, 512), (512, 683), (512, 683)),
    "512x683 in two windows, to 1536x2048": (150, ([0], [0, 171]), (512, 512), (512, 683), (1536, 2048)),
    "768x1024 in six windows, to 1536x2048": (150, ([0, 256], [0, 341, 512]), (512, 512), (768, 1024), (1536, 2048)),
}
TYPICAL = ("150x64x64 to 512x512", "512x683 in two windows")
LOGITS = ["smooth", "noise"]


def make_logits(kind: str, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "noise":
        return torch.randn(shape, generator=generator)
    batch, channels, h, w = shape
    coarse = torch.randn(batch, channels, h // 8 + 1, w // 8 + 1, generator=generator)
    return 4 * interpolate(coarse, (h, w), mode="bicubic") + 0.3 * torch.randn(shape, generator=generator)


def merge_and_resize(logits: torch.Tensor, ys, xs, crop, image, size) -> torch.Tensor:
    """Sliding-window merging as usually written: windows are added up at image size."""
    total = logits.new_zeros(1, logits.shape[2], *image)
    count = logits.new_zeros(image)
    for window, (y, x) in enumerate((y, x) for y in ys for x in xs):
        place = (..., slice(y, y + crop[0]), slice(x, x + crop[1]))
        total[place] += interpolate(logits[:, window], crop, mode="bilinear")
        count[place] += 1
    return interpolate(total / count, size, mode="bilinear").argmax(1)


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("case", some_of([*CASES, *WINDOWS], TYPICAL))
def test_side_by_side(case: str, kind: str, device: str, keep: Callable) -> None:
    if case in CASES:
        name = "upsample_argmax"
        batch, channels, low, high = CASES[case]
        logits = make_logits(kind, batch, channels, *low).to(device)

        def call(impl: str) -> torch.Tensor:
            return ops.upsample_argmax(logits, high, impl=impl)

        variants = {
            "pytorch": lambda: interpolate(logits, high, mode="bilinear").argmax(1),
            "reference": lambda: call("reference"),
        }
    else:
        name, batch = "upsample_argmax_windows", 1
        channels, (ys, xs), crop, image, high = WINDOWS[case]
        logits = make_logits(kind, len(ys) * len(xs), channels, crop[0] // 8, crop[1] // 8)[None].to(device)

        def call(impl: str) -> torch.Tensor:
            return ops.upsample_argmax_windows(logits, ys, xs, crop_size=crop, image_size=image, size=high, impl=impl)

        variants = {"pytorch": lambda: merge_and_resize(logits, ys, xs, crop, image, high)}
    variants |= variants_of(name, device, call, all_levels=True)
    expected = variants["pytorch"]()
    for variant, run in variants.items():  # no time for labels that differ by more than rounding explains (near ties)
        differing = (run() != expected).float().mean().item()
        assert differing <= 1e-4, f"{variant}: {differing:.2%} of the labels differ from PyTorch's"
    gigabytes = (4 * logits.numel() + 8 * batch * high[0] * high[1]) / 1e9  # logits in, labels out
    facts = {"case": case, "logits": kind, "dtype": "float32", "gigabytes": gigabytes}
    # The reference copies its taps from the host, which no graph can hold.
    keep(side_by_side(variants, device, seconds=5, graphs=False, **facts))
