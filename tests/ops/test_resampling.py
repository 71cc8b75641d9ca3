"""The sparse matrices of resizing and window merging, against PyTorch's interpolate of an identity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from vpd_fast.ops.resampling import resize_weights, window_weights


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("n_in", "n_out"), [(1, 1), (1, 7), (7, 1), (64, 512), (5, 5), (9, 20), (100, 33), (3, 1000)])
def test_resize_is_interpolate(n_in: int, n_out: int, align_corners: bool) -> None:
    taps = resize_weights(n_in, n_out, align_corners)
    identity = torch.eye(n_in, dtype=torch.float64)[:, None]
    expected = interpolate(identity[..., None], (n_out, 1), mode="bilinear", align_corners=align_corners)[:, 0, :, 0].T
    torch.testing.assert_close(taps.dense(n_in).double(), expected, rtol=2**-24, atol=1e-13)


def test_rows_are_canonical() -> None:
    for taps in (resize_weights(64, 512, False), window_weights(8, (0, 20, 36), 72, 64, 100, 333)):
        assert taps.offsets.dtype == np.int64
        assert taps.sources.dtype == np.int32
        assert taps.weights.dtype == np.float32
        assert (taps.weights > 0).all()
        for first, last in zip(taps.offsets, taps.offsets[1:], strict=False):
            assert (np.diff(taps.sources[first:last]) > 0).all()
            assert taps.weights[first:last].sum() == pytest.approx(1, abs=1e-6)


def test_padded_form_is_the_same_matrix() -> None:
    taps = window_weights(8, (0, 20, 36), 72, 64, 100, 77)
    for count in (taps.max_taps, taps.max_taps + 3):
        sources, weights = taps.padded(count, torch.device("cpu"))
        assert sources.shape == weights.shape == (77, count)
        assert (weights > 0).all()
        matrix = torch.zeros(77, 24).scatter_add_(1, sources.long(), weights)
        torch.testing.assert_close(matrix, taps.dense(24), rtol=count * 2**-24, atol=0)
