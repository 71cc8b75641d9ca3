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
from vpd_fast.bench.statistics import rows_of
from vpd_fast.bench.suites import some_of, variants_of
from vpd_fast.bench.timing import measure

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
LOGITS = ["smooth", "noise"]


def make_logits(kind: str, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "noise":
        return torch.randn(shape, generator=generator)
    batch, channels, h, w = shape
    coarse = torch.randn(batch, channels, h // 8 + 1, w // 8 + 1, generator=generator)
    return 4 * interpolate(coarse, (h, w), mode="bicubic") + 0.3 * torch.randn(shape, generator=generator)


def resize_variants(case: str, kind: str, device: str) -> dict[str, Callable[[], torch.Tensor]]:
    batch, channels, low, high = CASES[case]
    logits = make_logits(kind, batch, channels, *low).to(device)

    def call(impl: str) -> torch.Tensor:
        return ops.upsample_argmax(logits, high, impl=impl)

    return {
        "pytorch": lambda: interpolate(logits, high, mode="bilinear").argmax(1),
        "reference": lambda: call("reference"),
        **variants_of("upsample_argmax", device, call, all_levels=True),
    }


def merge_and_resize(logits: torch.Tensor, ys, xs, crop, image, size) -> torch.Tensor:
    """Sliding-window merging as usually written: windows are added up at image size."""
    total = logits.new_zeros(1, logits.shape[2], *image)
    count = logits.new_zeros(image)
    for window, (y, x) in enumerate((y, x) for y in ys for x in xs):
        place = (..., slice(y, y + crop[0]), slice(x, x + crop[1]))
        total[place] += interpolate(logits[:, window], crop, mode="bilinear")
        count[place] += 1
    return interpolate(total / count, size, mode="bilinear").argmax(1)


def window_variants(case: str, kind: str, device: str) -> dict[str, Callable[[], torch.Tensor]]:
    channels, (ys, xs), crop, image, size = WINDOWS[case]
    logits = make_logits(kind, len(ys) * len(xs), channels, crop[0] // 8, crop[1] // 8)[None].to(device)

    def call(impl: str) -> torch.Tensor:
        return ops.upsample_argmax_windows(logits, ys, xs, crop_size=crop, image_size=image, size=size, impl=impl)

    return {"pytorch": lambda: merge_and_resize(logits, ys, xs, crop, image, size)} | variants_of(
        "upsample_argmax_windows", device, call, all_levels=True
    )


def require_parity(variants: dict[str, Callable[[], torch.Tensor]]) -> None:
    """No time is reported for labels that differ from PyTorch's by more than rounding explains (a few near ties)."""
    expected = variants["pytorch"]()
    for name, variant in variants.items():
        differing = (variant() != expected).float().mean().item()
        assert differing <= 1e-4, f"{name}: {differing:.2%} of the labels differ from PyTorch's"


MAKERS = dict.fromkeys(CASES, resize_variants) | dict.fromkeys(WINDOWS, window_variants)
TYPICAL = ("150x64x64 to 512x512", "512x683 in two windows")


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("case", some_of(MAKERS, TYPICAL))
def test_side_by_side(case: str, kind: str, device: str, keep: Callable) -> None:
    variants = MAKERS[case](case, kind, device)
    require_parity(variants)
    if case in CASES:
        batch, channels, low, high = CASES[case]
        elements = batch * channels * low[0] * low[1], batch * high[0] * high[1]
    else:
        channels, (ys, xs), crop, _, high = WINDOWS[case]
        elements = len(ys) * len(xs) * channels * crop[0] * crop[1] // 64, high[0] * high[1]
    gigabytes = (4 * elements[0] + 8 * elements[1]) / 1e9  # logits in, labels out
    facts = {"case": case, "logits": kind, "dtype": "float32", "threads": torch.get_num_threads()}
    # The reference copies its taps from the host, which no graph can hold.
    keep(rows_of(measure(variants, device, seconds=5, graphs=False), "pytorch", gigabytes, **facts))
