"""`conv2d` on a GPU: a kernel that prepares, rounds and pads the image, where it needs it, and one that multiplies.

Images of 8 bits have one scale and one zero each, which the padding has, too, so that every position counts alike.
"""

from collections.abc import Callable

import torch
from vpd_fast.kernels._geometry import Geometry
from vpd_fast.kernels._product import product
from vpd_fast.kernels._rows import prepare


def forward(
    x: torch.Tensor,
    x2: torch.Tensor | None,
    weight: torch.Tensor,
    column_scales: torch.Tensor | None,
    sums: torch.Tensor | None,
    *,
    bias: torch.Tensor | None,
    kernel: tuple[int, int],
    stride: int,
    padding: tuple[int, int, int, int],
    affine: torch.Tensor | None,
    silu: bool,
    scale: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    ranges: torch.Tensor | None = None,
    statistics: tuple[torch.Tensor, int] | None = None,
    multiply: Callable[..., None] = product,
) -> None:
    """Fills out (B, OH, OW, N). weight: (N, KH * KW * C) contiguous. Others: as in `vpd_fast.ops.conv2d`."""
    untouched = not silu and affine is None and scale is None
    scales = zeros = None
    if not untouched or any(t is not None and t.dtype != weight.dtype for t in (x, x2)):
        how = {"affine": affine, "silu": silu, "scale": scale, "padding": tuple(padding), "per_image": True}
        how["ranges"] = ranges
        (x, scales, zeros), x2, padding = prepare(x, x2, weight.dtype, **how), None, (0, 0, 0, 0)
    geometry = Geometry(out.shape[1], out.shape[2], tuple(kernel), stride, padding[0], padding[1])
    multiply(
        *(x, x2, geometry, weight, out),
        **{"column_scales": column_scales, "sums": sums, "row_scales": scales, "row_zeros": zeros},
        **{"bias": bias, "activation": activation, "residual": residual, "statistics": statistics},
    )
