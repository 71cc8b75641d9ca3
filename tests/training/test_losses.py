"""Losses against numbers worked out by hand; tests/models/test_golden.py compares them with the original's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vpd_fast.errors import InputError
from vpd_fast.training.losses import referring_loss, segmentation_loss, silog_loss


def test_segmentation_by_hand():
    logits = torch.tensor([2.0, 0.0]).log1p().view(1, 2, 1, 1).expand(1, 2, 2, 2)  # odds 3 to 1
    target = torch.tensor([[[0, 1], [0, 255]]])
    total = -2 * math.log(3 / 4) - math.log(1 / 4)
    torch.testing.assert_close(segmentation_loss(logits, target), torch.tensor(total / 4))
    torch.testing.assert_close(segmentation_loss(logits, target, ignored_in_mean=False), torch.tensor(total / 3))
    nothing = torch.full_like(target, 255)
    for counted in (True, False):
        assert segmentation_loss(logits, nothing, ignored_in_mean=counted) == 0


def test_segmentation_resizes_logits():
    logits, target = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 8, 10))
    large = torch.nn.functional.interpolate(logits, size=(8, 10), mode="bilinear", align_corners=False)
    assert torch.equal(segmentation_loss(logits, target), segmentation_loss(large, target))


def test_referring_by_hand():
    logits = torch.tensor([2.0, 0.0]).log1p().view(1, 2, 1, 1).expand(1, 2, 1, 3)
    target = torch.tensor([[[0, 0, 1]]])
    expected = -(2 * 0.9 * math.log(3 / 4) + 1.1 * math.log(1 / 4)) / (2 * 0.9 + 1.1)
    torch.testing.assert_close(referring_loss(logits, target), torch.tensor(expected))


def test_silog_by_hand():
    pred = torch.tensor([[[1.0, 2.0], [4.0, 7.0]]])
    target = torch.tensor([[[2.0, 2.0], [1.0, 0.0]]])  # log ratios ln 2, 0, -2 ln 2; the last is unknown
    expected = math.log(2) * math.sqrt(5 / 3 - 0.5 / 9)
    for shape in (pred, pred[:, None]):
        torch.testing.assert_close(silog_loss(shape, target), torch.tensor(expected))
    torch.testing.assert_close(silog_loss(pred, target, lambda_=0.0), torch.tensor(math.log(2) * math.sqrt(5 / 3)))


@pytest.mark.parametrize("target", [torch.zeros(1, 2, 2), torch.full((1, 2, 2), 3.0)])
def test_silog_where_it_has_no_slope(target: Tensor):
    pred = torch.full((1, 2, 2), 3.0, requires_grad=True)  # nothing known, or nothing wrong
    loss = silog_loss(pred, target)
    loss.backward()
    assert loss == 0
    assert torch.equal(pred.grad, torch.zeros_like(pred))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4)), "float32"),
        ((torch.zeros(1, 2, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)), r"\(2, 4, 4\)"),
        ((torch.zeros(1, 2, 4, 4), torch.full((1, 4, 4), 2)), "classes 0 to 1, got 2 to 2"),
        ((torch.zeros(1, 2, 4, 4), torch.full((1, 4, 4), -1)), "got -1 to -1"),
    ],
)
def test_bad_input(arguments, message):
    for loss in (segmentation_loss, referring_loss):
        with pytest.raises(InputError, match=message):
            loss(*arguments)


def test_bad_depth():
    with pytest.raises(InputError, match=r"\(1, 2, 2\) .* and \(1, 2, 3\)"):
        silog_loss(torch.ones(1, 2, 2), torch.ones(1, 2, 3))
