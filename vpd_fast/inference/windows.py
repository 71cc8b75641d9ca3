"""Windows over an image, and values predicted on them merged back into one picture.

The reference resizes each window's logits to the window, averages them on the image, and resizes the average to the
output. All of that is linear and separable, so the output is `rows @ values @ columns.T`, where `values` holds the
windows' low-resolution maps side by side. Rows of the output are made when they are needed, and full-resolution logits
never exist as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from vpd_fast.config import SIZE_MULTIPLE
from vpd_fast.errors import InputError
from vpd_fast.ops import upsample_argmax_windows
from vpd_fast.ops.resampling import window_weights

if TYPE_CHECKING:
    from collections.abc import Iterator

STRIP_BYTES = 64 * 2**20  # rows are merged in strips of about this size


def window_starts(length: int, crop: int, stride: int) -> tuple[int, ...]:
    """Return the first pixels of windows along an axis: every `stride`, the last shifted back to end with the image."""
    count = max(length - crop + stride - 1, 0) // stride + 1
    return tuple(max(min(i * stride, length - crop), 0) for i in range(count))


@dataclass(frozen=True)
class WindowAxis:
    """The windows along one axis of an image: its pixels, the windows' first pixels, size, and size with padding."""

    length: int
    starts: tuple[int, ...]
    size: int
    padded: int

    @classmethod
    def sliding(cls, length: int, crop: int, stride: int, multiple: int = SIZE_MULTIPLE) -> WindowAxis:
        """Return the reference's grid, whose windows will be padded to the next multiple of `multiple`."""
        size = min(crop, length)
        return cls(length, window_starts(length, crop, stride), size, -(-size // multiple) * multiple)

    def matrix(self, cells: int, out: int) -> torch.Tensor:
        """Return weights (out, len(starts) * cells): what each of a window's `cells` values gives to each output."""
        weights = window_weights(cells, self.starts, self.padded, self.size, self.length, out)
        return weights.dense(len(self.starts) * cells)


@dataclass(frozen=True)
class WindowGrid:
    """Windows on an image: the product of two axes, in row-major order."""

    y: WindowAxis
    x: WindowAxis

    @classmethod
    def sliding(cls, size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]) -> WindowGrid:
        """Return the reference's grid for an image of `size` (height, width)."""
        return cls(*(WindowAxis.sliding(*axis) for axis in zip(size, crop, stride, strict=True)))

    def __len__(self) -> int:
        return len(self.y.starts) * len(self.x.starts)

    def batches(self, images: torch.Tensor, batch_size: int, fill: float = 0.0) -> Iterator[torch.Tensor]:
        """Yield windows of images (N,C,H,W), padded with `fill`, in batches (<= batch_size, C, padded height, width).

        All windows of the first image come first.
        """
        margins = (0, self.x.padded - self.x.size, 0, self.y.padded - self.y.size)
        corners = [(i, top, left) for i in range(len(images)) for top in self.y.starts for left in self.x.starts]
        for first in range(0, len(corners), batch_size):
            windows = [
                images[i : i + 1, :, top : top + self.y.size, left : left + self.x.size]
                for i, top, left in corners[first : first + batch_size]
            ]
            yield pad(torch.cat(windows), margins, value=fill)

    def labels(self, windows: torch.Tensor, out_size: tuple[int, int]) -> torch.Tensor:
        """Return labels (N, H, W) int64 of windows (N, len(self), C, h, w) of images: for each the argmax over the
        channels of `field(its windows, out_size)`."""
        return upsample_argmax_windows(
            windows.float() if windows.dtype == torch.float64 else windows,
            self.y.starts,
            self.x.starts,
            padded_size=(self.y.padded, self.x.padded),
            crop_size=(self.y.size, self.x.size),
            image_size=(self.y.length, self.x.length),
            size=out_size,
        )

    def field(self, windows: torch.Tensor, out_size: tuple[int, int], flip: str | None = None) -> WindowField:
        """Merge values (len(self), C, h, w) predicted on the windows into a picture of out_size (height, width)."""
        n, channels, height, width = windows.shape
        grid = windows.view(len(self.y.starts), len(self.x.starts), channels, height, width)
        values = grid.permute(2, 0, 3, 1, 4).reshape(channels, -1, n // len(self.y.starts) * width)
        rows, columns = self.y.matrix(height, out_size[0]), self.x.matrix(width, out_size[1])
        if flip == "vertical":
            rows = rows.flip(0)
        elif flip == "horizontal":
            columns = columns.flip(0)
        return WindowField(values.float(), *(matrix.to(values.device) for matrix in (rows, columns)))


@dataclass(frozen=True)
class WindowField:
    """A picture (C, H, W) kept as low-resolution window values (C, h, w), rows (H, h) and columns (W, w)."""

    values: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    @property
    def channels(self) -> int:
        return self.values.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        return self.rows.shape[0], self.columns.shape[0]

    def cpu(self) -> WindowField:
        """Return the same picture, kept in the computer's memory."""
        return WindowField(self.values.cpu(), self.rows.cpu(), self.columns.cpu())

    def select(self, channel: int) -> WindowField:
        """Return one channel of the picture."""
        return WindowField(self.values[channel : channel + 1], self.rows, self.columns)

    def strip(self, first: int, last: int) -> torch.Tensor:
        """Return rows first..last-1 of the picture, (C, last - first, W)."""
        rows = self.rows[first:last]
        used = rows.any(0).nonzero()
        low, high = int(used[0]), int(used[-1]) + 1
        return (rows[:, low:high] @ self.values[:, low:high]) @ self.columns.T

    def picture(self) -> torch.Tensor:
        """Return the whole picture (C, H, W)."""
        return self.strip(0, self.size[0])


def strips(channels: int, size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield row ranges (first, last) that cut a float32 picture (channels, *size) into pieces of about STRIP_BYTES."""
    height, width = size
    step = max(STRIP_BYTES // (4 * channels * width), 1)
    for first in range(0, height, step):
        yield first, min(first + step, height)


def check_pair(name: str, value: object) -> tuple[int, int]:
    """Return a positive int, or a pair of them, as a pair (height, width). Raises InputError."""
    pair = (value, value) if isinstance(value, int) else value
    if isinstance(pair, tuple | list) and len(pair) == 2 and not isinstance(value, bool):
        height, width = pair
        if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
            return height, width
    raise InputError(f"{name} must be a positive int or (height, width), got {value!r}")
