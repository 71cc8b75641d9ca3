"""The losses of the three tasks, as the original computes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast.errors import InputError
from vpd_fast.labels import IGNORED

REFERRING_WEIGHTS = (0.9, 1.1)  # of the background and the object


def segmentation_loss(
    logits: Tensor, target: Tensor, *, ignore_index: int = IGNORED, ignored_in_mean: bool = True
) -> Tensor:
    """Return the cross entropy per pixel, a scalar.

    logits (B,C,h,w), resized bilinearly to the target's size if theirs is another; target (B,H,W) int64.
    ignored_in_mean: divide by the number of all pixels, ignored ones included, which is what mmsegmentation 0.x does;
    else by the number of pixels that have a class. Raises InputError.
    """
    _check(logits, target, torch.long, 4)
    _check_classes(target, logits.shape[1], ignore_index)
    if logits.shape[2:] != target.shape[1:]:
        logits = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")
    if ignored_in_mean:
        return total / target.numel()
    return total / (target != ignore_index).sum().clamp(min=1)


def referring_loss(logits: Tensor, target: Tensor, *, weights: Sequence[float] = REFERRING_WEIGHTS) -> Tensor:
    """Return the weighted cross entropy of object and background, divided by the sum of the weights: a scalar.

    logits (B,2,H,W), target (B,H,W) int64, 1 on the object. Raises InputError.
    """
    _check(logits, target, torch.long, 4)
    if logits.shape[1] != 2 or logits.shape[2:] != target.shape[1:]:
        raise InputError(f"logits must have shape (B, 2, H, W) of the target, got {_shapes(logits, target)}")
    _check_classes(target, 2, None)
    return F.cross_entropy(logits, target, weight=logits.new_tensor(weights))


def silog_loss(pred: Tensor, target: Tensor, *, lambda_: float = 0.5) -> Tensor:
    """Return the scale-invariant log loss (Eigen et al., NeurIPS 2014), its root as in BTS and the original: a scalar.

    pred (B,1,H,W) or (B,H,W) and target (B,H,W), in metres; pixels with target 0 are unknown and left out. A batch
    without any other gives 0. Raises InputError.
    """
    pred = pred[:, 0] if pred.dim() == 4 and pred.shape[1] == 1 else pred
    if pred.shape != target.shape or pred.dim() != 3 or not target.is_floating_point():
        raise InputError(f"pred and target must be floats of one shape (B, H, W), got {_shapes(pred, target)}")
    valid = target > 0
    count = valid.sum().clamp(min=1)
    # No indexing by the mask: its size would have to come back from the GPU. log(1) = 0 adds nothing.
    one = torch.ones((), dtype=pred.dtype, device=pred.device)
    difference = torch.where(valid, target, one).log() - torch.where(valid, pred, one).log()
    variance = difference.square().sum() / count - lambda_ * (difference.sum() / count).square()
    # The root has no slope at 0, and what rounding leaves there may be negative.
    return torch.where(variance > 0, variance, one).sqrt() * (variance > 0)


def _check(logits: Tensor, target: Tensor, dtype: torch.dtype, dims: int) -> None:
    if logits.dim() != dims or target.dim() != dims - 1 or len(logits) != len(target) or target.dtype != dtype:
        raise InputError(f"logits must be (B, C, H, W) and target (B, H, W) {dtype}, got {_shapes(logits, target)}")


def _check_classes(target: Tensor, count: int, ignored: int | None) -> None:
    """Raise for labels beyond the classes; on a GPU, where looking would wait for it, cross entropy itself does."""
    if target.device.type != "cpu" or not target.numel():
        return
    valid = target if ignored is None else target[target != ignored]
    if valid.numel() and not 0 <= int(valid.min()) <= int(valid.max()) < count:
        raise InputError(f"target must have classes 0 to {count - 1}, got {int(valid.min())} to {int(valid.max())}")


def _shapes(a: Tensor, b: Tensor) -> str:
    return f"{tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}"
