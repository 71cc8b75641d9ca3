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
    upsample: bool,
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
    """Fills out (B, OH, OW, N). weight: (taps, N, KH * KW * C) contiguous. Others: as in `vpd_fast.ops.conv2d`.

    The four phases of `upsample` read the same prepared image.
    """
    padding = (1, 1, 1, 1) if upsample else padding
    untouched = not silu and affine is None and scale is None
    scales = zeros = None
    if not untouched or any(t is not None and t.dtype != weight.dtype for t in (x, x2)):
        how = {"affine": affine, "silu": silu, "scale": scale, "padding": padding, "per_image": True, "ranges": ranges}
        (x, scales, zeros), x2, padding = prepare(x, x2, weight.dtype, **how), None, (0, 0, 0, 0)
    top, left = padding[:2]
    finish = {"row_scales": scales, "row_zeros": zeros, "bias": bias, "activation": activation}
    for i in range(len(weight)):
        part = {"column_scales": column_scales, "sums": sums, "residual": residual, "statistics": statistics}
        own, y, x_ = out, 0, 0
        if upsample:
            y, x_ = divmod(i, 2)
            own = out[:, y::2, x_::2]
            part |= {"residual": None if residual is None else residual[:, y::2, x_::2]}
            if statistics is not None:
                part["statistics"] = statistics[0].tensor_split(4, dim=1)[i], statistics[1]
        part |= {name: None if part[name] is None else part[name][i] for name in ("column_scales", "sums")}
        above, before = max(0, top - y), max(0, left - x_)  # what is left of the padding, or else what is skipped
        geometry = Geometry(own.shape[1], own.shape[2], tuple(kernel), stride, above, before)
        read = (None if t is None else t[:, above - top + y :, before - left + x_ :] for t in (x, x2))
        multiply(*read, geometry, weight[i], own, **finish, **part)
