"""upsample_argmax_windows against sliding-window merging written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from vpd_fast.errors import InputError

from .on_device import ops

UNIT_ROUNDOFF = 2.0**-24


def starts(image: int, crop: int, stride: int) -> list[int]:
    """Window edges of sliding-window inference: every stride pixels, the last one flush with the end."""
    count = max(image - crop + stride - 1, 0) // stride + 1
    return [min(i * stride, image - crop) for i in range(count)]


def merge_windows(logits, ys, xs, crop_size, image_size, size, padded_size=None) -> torch.Tensor:
    """(B, windows, C, h, w) -> (B, C, *size) in float64, window by window."""
    total = torch.zeros(logits.shape[0], logits.shape[2], *image_size, dtype=torch.float64)
    count = torch.zeros(image_size, dtype=torch.float64)
    window = 0
    for y in ys:
        for x in xs:
            place = (..., slice(y, y + crop_size[0]), slice(x, x + crop_size[1]))
            resized = interpolate(logits[:, window].double(), padded_size or crop_size, mode="bilinear")
            total[place] += resized[..., : crop_size[0], : crop_size[1]]
            count[place] += 1
            window += 1
    return interpolate(total / count, size, mode="bilinear")


CASES = {
    "one window": ((64, 64), (64, 64), (64, 64), (64, 64)),
    "one window, resized": ((64, 64), (64, 64), (64, 64), (97, 41)),
    "two thirds stride": ((96, 130), (64, 64), (43, 43), (96, 130)),
    "flush last window": ((65, 129), (64, 64), (64, 64), (65, 129)),
    "many overlaps": ((80, 100), (64, 48), (9, 7), (80, 100)),
    "enlarged": ((96, 130), (64, 64), (43, 43), (200, 333)),
    "reduced": ((96, 130), (64, 64), (43, 43), (31, 50)),
    "one pixel": ((96, 130), (64, 64), (43, 43), (1, 1)),
    "not a multiple of 8": ((75, 91), (60, 60), (40, 33), (75, 91)),
}


def make_case(name: str, channels: int = 19, batch: int = 1) -> tuple[torch.Tensor, dict]:
    image, crop, stride, size = CASES[name]
    ys, xs = (starts(image[i], crop[i], stride[i]) for i in range(2))
    generator = torch.Generator().manual_seed(0)
    h, w = (side // 8 for side in crop)
    coarse = torch.randn(batch * len(ys) * len(xs), channels, 3, 3, generator=generator) * 3
    logits = interpolate(coarse, (h, w), mode="bicubic").view(batch, len(ys) * len(xs), channels, h, w)
    return logits, {"ys": ys, "xs": xs, "crop_size": crop, "image_size": image, "size": size}


@pytest.mark.parametrize("name", CASES)
def test_matches_merging_window_by_window(impl: str, name: str) -> None:
    # The interpreter's time is by channels and taps, of which windows that overlap have many.
    logits, geometry = make_case(name, channels=3 if impl == "triton" else 19, batch=2)
    labels = ops.upsample_argmax_windows(logits, **geometry, impl=impl)
    values = merge_windows(logits, **geometry)
    # Roundings of one channel: two per tap and axis, at most 64 taps in these cases, and those of the weights.
    bound = 2 * (2 * 2 * 64) * UNIT_ROUNDOFF * logits.abs().max().item()
    gap = values.amax(1) - values.gather(1, labels[:, None])[:, 0]
    assert labels.shape == (2, *geometry["size"])
    assert gap.max().item() <= bound


def test_padding_is_cut_off(impl: str) -> None:
    logits, geometry = make_case("not a multiple of 8")
    geometry["padded_size"] = (64, 96)
    labels = ops.upsample_argmax_windows(logits, **geometry, impl=impl)
    values = merge_windows(logits, **geometry)
    gap = values.amax(1) - values.gather(1, labels[:, None])[:, 0]
    assert gap.max().item() <= 2 * (2 * 2 * 64) * UNIT_ROUNDOFF * logits.abs().max().item()
    del geometry["padded_size"]
    assert not torch.equal(labels, ops.upsample_argmax_windows(logits, **geometry, impl=impl))


def test_one_window_is_upsample_argmax(impl: str) -> None:
    logits, geometry = make_case("one window")
    labels = ops.upsample_argmax_windows(logits, **geometry, impl=impl)
    assert torch.equal(labels, ops.upsample_argmax(logits[:, 0], (64, 64), impl=impl))


def test_size_defaults_to_the_image(impl: str) -> None:
    logits, geometry = make_case("two thirds stride")
    del geometry["size"]
    assert ops.upsample_argmax_windows(logits, **geometry, impl=impl).shape == (1, 96, 130)


def test_strides_do_not_matter(impl: str) -> None:
    logits, geometry = make_case("two thirds stride", batch=2)
    if impl == "triton":  # whose time in the interpreter is by channels
        logits = logits[:, :, :4]
    expected = ops.upsample_argmax_windows(logits, **geometry, impl=impl)
    for order in ((0, 1, 3, 4, 2), (1, 0, 2, 3, 4), (2, 4, 0, 1, 3)):
        back = [order.index(i) for i in range(5)]
        strided = logits.permute(order).contiguous().permute(back)
        assert torch.equal(ops.upsample_argmax_windows(strided, **geometry, impl=impl), expected)


def test_more_taps_than_the_kernel_takes_are_refused_not_truncated() -> None:
    side = 72
    ys = list(range(side - 64 + 1))
    logits = torch.randn(1, len(ys) ** 2, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    geometry = {"ys": ys, "xs": ys, "crop_size": (64, 64), "image_size": (side, side), "size": (1, 3)}
    reason = ops.explain("upsample_argmax_windows", logits, **geometry)
    assert reason["reference"] == "ok"
    labels = ops.upsample_argmax_windows(logits, **geometry)
    assert torch.equal(labels, ops.upsample_argmax_windows(logits, **geometry, impl="reference"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ys": [0, 40]}, r"windows of 64 pixels at \[40\] leave the image, which is 96 pixels long"),
        ({"xs": [-1, 43, 66]}, r"at \[-1\] leave the image"),
        ({"ys": [0, 16]}, r"leave pixel 80 of 96 uncovered"),
        ({"ys": [0]}, r"logits must have shape \(B, windows=3, C, h, w\)"),
        ({"ys": []}, "ys must be one or more integers"),
        ({"xs": [0.0, 43, 66]}, "xs must be one or more integers"),
        ({"padded_size": (64, 63)}, "windows of 64 pixels cannot be cut from 63 pixels"),
        ({"crop_size": (64,)}, r"crop_size must be \(height, width\)"),
        ({"image_size": (0, 130)}, "image_size must be two positive integers"),
        ({"size": (5, 0)}, "size must be two positive integers"),
        ({"logits": torch.zeros(6, 3, 8, 8)}, r"logits must have shape \(B, windows=6, C, h, w\)"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    logits, geometry = make_case("two thirds stride")
    with pytest.raises(InputError, match=message):
        ops.upsample_argmax_windows(**{"logits": logits, **geometry, **change})


def test_opcheck() -> None:
    logits, geometry = make_case("two thirds stride")
    g = geometry
    arguments = (logits, g["ys"], g["xs"], g["crop_size"], g["crop_size"], g["image_size"], g["size"], "auto")
    torch.library.opcheck(torch.ops.vpd_fast.upsample_argmax_windows.default, arguments)
    strided = logits.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    torch.library.opcheck(torch.ops.vpd_fast.upsample_argmax_windows.default, (strided, *arguments[1:]))


def test_torch_compile_through_the_public_function() -> None:
    logits, geometry = make_case("two thirds stride")
    compiled = torch.compile(
        lambda x: ops.upsample_argmax_windows(x, **geometry) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(logits), ops.upsample_argmax_windows(logits, **geometry) + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("where", ["auto", "cuda", "triton"])
def test_cuda(where: str, name: str) -> None:
    logits, geometry = make_case(name, batch=2)
    labels = ops.upsample_argmax_windows(logits.cuda(), **geometry, impl=where).cpu()
    values = merge_windows(logits, **geometry)
    bound = 2 * (2 * 2 * 64) * UNIT_ROUNDOFF * logits.abs().max().item()
    assert (values.amax(1) - values.gather(1, labels[:, None])[:, 0]).max().item() <= bound
