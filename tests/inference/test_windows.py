"""Window grids and the merging of windows against a literal implementation: resize each, add up, divide, resize."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vpd_fast.errors import InputError
from vpd_fast.inference.windows import STRIP_BYTES, WindowAxis, WindowGrid, check_pair, strips, window_starts


def literal_starts(length: int, crop: int, stride: int) -> list[int]:
    starts = []
    for i in range(max(length - crop + stride - 1, 0) // stride + 1):
        end = min(i * stride + crop, length)
        starts.append(max(end - crop, 0))
    return starts


@pytest.mark.parametrize("length", [1, 63, 64, 127, 128, 129, 171, 213, 214, 500, 683, 2048])
@pytest.mark.parametrize(("crop", "stride"), [(128, 85), (512, 341), (128, 128), (64, 1)])
def test_windows_start_where_the_reference_puts_them(length: int, crop: int, stride: int) -> None:
    assert list(window_starts(length, crop, stride)) == literal_starts(length, crop, stride)


def literal_merge(windows: torch.Tensor, grid: WindowGrid, out: tuple[int, int]) -> torch.Tensor:
    canvas = torch.zeros(1, windows.shape[1], grid.y.length, grid.x.length, dtype=windows.dtype)
    count = torch.zeros_like(canvas)
    corners = [(y, x) for y in grid.y.starts for x in grid.x.starts]
    for window, (y, x) in zip(windows, corners, strict=True):
        full = F.interpolate(window[None], (grid.y.padded, grid.x.padded), mode="bilinear", align_corners=False)
        place = (..., slice(y, y + grid.y.size), slice(x, x + grid.x.size))
        canvas[place] += full[..., : grid.y.size, : grid.x.size]
        count[place] += 1
    assert count.min() > 0
    return F.interpolate(canvas / count, out, mode="bilinear", align_corners=False)[0]


GRIDS = [
    ((128, 171), (128, 128), (85, 85), (96, 129)),
    ((300, 131), (128, 64), (85, 40), (300, 131)),
    ((1, 700), (128, 128), (85, 85), (3, 1001)),
    ((63, 65), (128, 128), (85, 85), (63, 65)),
    ((1, 1), (128, 128), (85, 85), (1, 1)),
    ((200, 90), (100, 100), (60, 60), (50, 500)),
]


@pytest.mark.parametrize(("size", "crop", "stride", "out"), GRIDS)
def test_merged_windows_equal_the_literal_average(
    size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int], out: tuple[int, int]
) -> None:
    grid = WindowGrid.sliding(size, crop, stride)
    windows = torch.randn(len(grid), 4, grid.y.padded // 8, grid.x.padded // 8)
    expected = literal_merge(windows.double(), grid, out)
    field = grid.field(windows, out)
    assert field.size == out
    torch.testing.assert_close(field.picture().double(), expected, rtol=0, atol=2e-5)
    for flip, axis in (("horizontal", 2), ("vertical", 1)):
        flipped = grid.field(windows, out, flip).picture().double()
        torch.testing.assert_close(flipped, expected.flip(axis), rtol=0, atol=2e-5)
    middle = out[0] // 2
    torch.testing.assert_close(field.strip(middle, out[0]), field.picture()[:, middle:], rtol=0, atol=1e-5)
    torch.testing.assert_close(field.select(2).picture(), field.picture()[2:3], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "crop", "stride", "out"), GRIDS)
def test_labels_are_the_argmax_of_the_picture(
    size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int], out: tuple[int, int]
) -> None:
    grid = WindowGrid.sliding(size, crop, stride)
    windows = torch.randn(len(grid), 4, grid.y.padded // 8, grid.x.padded // 8)
    picture = literal_merge(windows.double(), grid, out)
    labels = grid.labels(windows[None], out)[0]
    assert labels.shape == out
    first, second = picture.topk(2, 0).values
    decided = first - second > 1e-5
    assert torch.equal(labels[decided], picture.argmax(0)[decided])


def test_batches_hold_the_windows_in_order_and_pad_them() -> None:
    image = torch.randn(1, 3, 60, 150)
    grid = WindowGrid.sliding((60, 150), (128, 128), (85, 85))
    batches = list(grid.batches(image, 2, fill=0.5))
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 64, 128)]
    assert torch.equal(batches[0][:, :, :60], torch.stack([image[0, :, :, :128], image[0, :, :, 22:]]))
    assert (batches[0][:, :, 60:] == 0.5).all()
    large = torch.randn(1, 3, 400, 400)
    grid = WindowGrid.sliding((400, 400), (128, 128), (85, 85))
    assert [len(batch) for batch in grid.batches(large, 10)] == [10, 10, 5]


def test_strips_cover_the_picture_once_and_bound_the_memory() -> None:
    pieces = list(strips(150, (10_000, 10_000)))
    assert pieces[0][0] == 0
    assert pieces[-1][1] == 10_000
    assert all(a[1] == b[0] for a, b in zip(pieces, pieces[1:], strict=False))
    assert max(last - first for first, last in pieces) * 150 * 10_000 * 4 <= STRIP_BYTES
    assert list(strips(10**9, (2, 5))) == [(0, 1), (1, 2)]


def test_windows_of_a_multiple_of_64_are_not_padded() -> None:
    assert WindowAxis.sliding(171, 128, 85) == WindowAxis(171, (0, 43), 128, 128)
    assert WindowAxis.sliding(65, 128, 85) == WindowAxis(65, (0,), 65, 128)


@pytest.mark.parametrize("value", [0, -1, 1.5, (1,), (1, 0), "64", True, None])
def test_pairs_are_checked(value: object) -> None:
    with pytest.raises(InputError, match="crop_size must be a positive int"):
        check_pair("crop_size", value)
