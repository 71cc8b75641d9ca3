"""Bilinear resizing, and merging of overlapping windows, as sparse matrices along one axis.

Both are linear and separable: a result is `A @ logits @ B.T` with one matrix for rows and one for columns, whose rows
have few non-zero weights (the taps of a filter), are non-negative and add up to 1.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from vpd_fast.errors import InputError


@dataclass(frozen=True, eq=False)
class ResamplingWeights:
    """A sparse (n_out, n_in) matrix in compressed rows; no weight is zero, sources ascend within a row.

    offsets: (n_out + 1,) int64. sources: int32 column numbers. weights: float32.
    """

    offsets: np.ndarray
    sources: np.ndarray
    weights: np.ndarray

    @functools.cached_property
    def max_taps(self) -> int:
        """The largest number of weights of a row."""
        return int(np.diff(self.offsets).max())

    def dense(self, n_in: int) -> torch.Tensor:
        """The matrix (n_out, n_in) itself, float32."""
        matrix = np.zeros((len(self.offsets) - 1, n_in), np.float32)
        matrix[np.repeat(np.arange(len(matrix)), np.diff(self.offsets)), self.sources] = self.weights
        return torch.from_numpy(matrix)

    def padded(self, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Sources (int32) and weights (float32), each (n_out, count).

        Where a row has fewer taps, its first is repeated and its weight divided among the copies; so no weight is
        zero, and infinities times zero cannot arise.
        """
        taps = np.diff(self.offsets)[:, None]
        tap = np.arange(count)
        first = (tap == 0) | (tap >= taps)
        position = self.offsets[:-1, None] + np.where(first, 0, tap)
        weights = self.weights[position] / np.where(first, count - taps + 1, 1).astype(np.float32)
        return torch.from_numpy(self.sources[position]).to(device), torch.from_numpy(weights).to(device)


@dataclass(frozen=True, eq=False)
class _Matrix:
    """A sparse matrix in coordinates, rows ascending, weights in float64."""

    rows: np.ndarray
    columns: np.ndarray
    weights: np.ndarray
    n_rows: int

    def head(self, n_rows: int) -> _Matrix:
        """The matrix of the first rows."""
        inside = self.rows < n_rows
        return _Matrix(self.rows[inside], self.columns[inside], self.weights[inside], n_rows)

    def __matmul__(self, other: _Matrix) -> _Matrix:
        counts = np.bincount(other.rows, minlength=other.n_rows)
        starts = np.cumsum(counts) - counts
        repeats = counts[self.columns]
        entry = np.repeat(np.arange(len(self.rows)), repeats)
        within = np.arange(len(entry)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        position = starts[self.columns[entry]] + within
        weights = self.weights[entry] * other.weights[position]
        return _Matrix(self.rows[entry], other.columns[position], weights, self.n_rows)

    def compressed(self) -> ResamplingWeights:
        """The matrix in compressed rows: entries of the same place are added up, zeros dropped."""
        width = int(self.columns.max()) + 1
        places, inverse = np.unique(self.rows * width + self.columns, return_inverse=True)
        weights = np.bincount(inverse, self.weights).astype(np.float32)
        places, weights = places[weights != 0], weights[weights != 0]
        offsets = np.searchsorted(places, np.arange(self.n_rows + 1) * width)
        return ResamplingWeights(offsets.astype(np.int64), (places % width).astype(np.int32), weights)


def _bilinear(n_in: int, n_out: int, align_corners: bool) -> _Matrix:
    """The matrix of `torch.nn.functional.interpolate(mode="bilinear", size=...)`; positions are exact fractions."""
    target = np.arange(n_out, dtype=np.int64)
    if align_corners:
        numerator, denominator = target * (n_in - 1), max(n_out - 1, 1)
    else:
        numerator, denominator = np.maximum((2 * target + 1) * n_in - n_out, 0), 2 * n_out
    low = numerator // denominator
    fraction = (numerator - low * denominator) / denominator
    high = np.minimum(low + 1, n_in - 1)
    columns = np.stack([low, high], 1).ravel()
    weights = np.stack([1 - fraction, fraction], 1).ravel()
    return _Matrix(np.repeat(target, 2), columns, weights, n_out)


@functools.lru_cache(maxsize=64)
def resize_weights(n_in: int, n_out: int, align_corners: bool) -> ResamplingWeights:
    """Weights of bilinear resizing of one axis from n_in to n_out, as PyTorch's interpolate does it."""
    return _bilinear(n_in, n_out, align_corners).compressed()


@functools.lru_cache(maxsize=64)
def window_weights(
    n_in: int, starts: tuple[int, ...], padded: int, crop: int, image: int, n_out: int
) -> ResamplingWeights:
    """Weights of sliding-window merging along one axis; the columns are window * n_in + position.

    Each window, n_in long, is resized to `padded`, its first `crop` pixels are placed at its start in an axis of length
    `image`; where windows overlap their mean is taken; the whole is resized to n_out. Raises InputError if a window is
    padded to less than the crop or leaves the image, or if a part of the image is in no window.
    """
    if padded < crop:
        raise InputError(f"windows of {crop} pixels cannot be cut from {padded} pixels")
    outside = [start for start in starts if not 0 <= start <= image - crop]
    if outside:
        raise InputError(f"windows of {crop} pixels at {outside} leave the image, which is {image} pixels long")
    window = _bilinear(n_in, padded, align_corners=False).head(crop)
    rows = np.concatenate([window.rows + start for start in starts])
    columns = np.concatenate([window.columns + index * n_in for index in range(len(starts))])
    # Each window adds weights of 1 to a pixel, so their sum is the number of windows there.
    covered = np.bincount(rows, np.tile(window.weights, len(starts)), minlength=image)
    if not covered.all():
        raise InputError(
            f"windows of {crop} pixels at {list(starts)} leave pixel {int(np.argmin(covered))} of {image} uncovered"
        )
    order = np.argsort(rows, kind="stable")
    weights = np.tile(window.weights, len(starts)) / np.rint(covered)[rows]
    merged = _Matrix(rows[order], columns[order], weights[order], image)
    return (_bilinear(image, n_out, align_corners=False) @ merged).compressed()
