"""Sizes that the kernels' offsets reach: 64 bits wide from one image to the next, 32 bits within an image."""

from collections.abc import Sequence

import torch

OFFSETS = 2**31
MAX_COLUMNS = 16384  # columns of a row, which is kept in registers
POSITIONS = 2**30  # of a whole batch; a tile counts a little beyond


def row_stride(x: torch.Tensor) -> int:
    """Elements from one row of (B, N, C) to the next, once channels that are strided have been copied."""
    return x.stride(1) if x.stride(2) == 1 else x.shape[2]


def span(x: torch.Tensor) -> int:
    """Elements from the first to the last of one image of (B, ..., C), also if they are copied."""
    extent = sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)) + 1
    return max(extent, x[:1].numel())


def product_refuses(
    x: torch.Tensor,
    x2: torch.Tensor | None,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    padding: Sequence[int],
) -> str | None:
    """Why `linear` or `conv2d` of these (B, ..., C) cannot be computed, or None. padding: top, left, bottom, right."""
    batch, channels = x.shape[0], x.shape[-1] + (0 if x2 is None else x2.shape[-1])
    if channels > MAX_COLUMNS:
        return f"a row has {channels} columns; this takes at most {MAX_COLUMNS}"
    if weight.numel() >= OFFSETS:
        return f"the weight has {weight.numel()} numbers; this takes fewer than 2**31"
    for name, image in (("x", x), ("x2", x2), ("residual", residual), ("out", out)):
        if image is not None and image.numel() and span(image) >= OFFSETS:
            return f"an image of {name} spans more than 2**31 elements"
    height, width = x.shape[1], x.shape[2] if x.dim() == 4 else 1
    padded = (height + padding[0] + padding[2]) * (width + padding[1] + padding[3])
    if padded * channels >= OFFSETS:
        return "a prepared image has more than 2**31 elements"
    for name, positions in (("padded x", batch * padded), ("out", out[..., 0].numel())):
        if positions >= POSITIONS:
            return f"{name} has {positions} positions; this takes fewer than 2**30"
    return None
