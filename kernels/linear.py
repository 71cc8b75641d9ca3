"""`linear` on a GPU: a kernel that prepares and rounds rows, where they need it, and one that multiplies them."""

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
    norm: bool,
    eps: float,
    affine: torch.Tensor | None,
    scale: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    statistics: tuple[torch.Tensor, int] | None = None,
    multiply: Callable[..., None] = product,
) -> None:
    """Fills out (B, M, N). weight: (N, K) contiguous. Others: as in `vpd_fast.ops.linear`, last strides 1."""
    x, x2, residual, image = (None if t is None else t.unsqueeze(2) for t in (x, x2, residual, out))
    untouched = not norm and affine is None and scale is None
    scales = zeros = None
    if not untouched or any(t is not None and t.dtype != weight.dtype for t in (x, x2)):
        x, scales, zeros = prepare(x, x2, weight.dtype, norm=norm, eps=eps, affine=affine, scale=scale)
        x2 = None
    multiply(
        *(x, x2, Geometry(out.shape[1], 1), weight, image),
        **{"column_scales": column_scales, "sums": sums, "row_scales": scales, "row_zeros": zeros},
        **{"bias": bias, "activation": activation, "residual": residual, "statistics": statistics},
    )
