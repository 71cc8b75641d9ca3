"""3x3 convolution with fewer multiplications: Winograd's minimal filtering of small tiles, with all that surrounds it.

A tile of outputs is a sum of products of a transformed tile of inputs with a transformed weight, one matrix product for
each tap of the transform (Lavin, Gray, "Fast algorithms for convolutional neural networks", 2015). With `taps`:

    16  F(2x2, 3x3): 2x2 outputs of 4x4 inputs, 2.25 times fewer multiplications
    36  F(4x4, 3x3): 4x4 outputs of 6x6 inputs, 4 times fewer; its rounding errors are some ten times larger
     9  F(2x2, 3x3) of an input enlarged to twice its size by repeating pixels: of the tile (a, b, b, c) one of four
        transformed inputs vanishes, so 9 of 16 taps remain, 4 times fewer, and the enlarged image is never made

Transforms and sums are float32. Before the products, transformed inputs are rounded to the precision of the weight: to
bfloat16, or to 8 bits, symmetrically, with a scale for each tile and tap. In front of such a rounding, SiLU may be off
by 5e-5 of its value. A tile whose input is not finite has results that are not; with 8-bit weights they are NaN.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast import _native
from vpd_fast.errors import InputError
from vpd_fast.ops import _gemm, _gemm_reference
from vpd_fast.ops._checks import check_choice, check_flag, check_tensor, check_value, is_int
from vpd_fast.ops._gemm import DTYPES
from vpd_fast.ops.packing import MAX_8_BITS, PackedWeight

ACTIVATIONS = (None, "relu", "silu")
STEPS = {9: 1, 16: 2, 36: 4}  # taps -> input pixels from one tile to the next
MIN_MAGNITUDE = 1e-30  # of a row of 8 bits: smaller numbers become zero

# Per number of taps, in one dimension: the transforms of inputs, weights and products (B^T, G and A^T in the papers).
_HALF, _SIXTH = 1 / 2, 1 / 6
_INPUT = {
    9: ((1, -1, 0), (0, 1, 0), (0, 1, -1)),
    16: ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    36: (
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    ),
}
_WEIGHT = {
    9: ((1, 0, 0), (1, 1, 1), (0, 0, 1)),
    16: ((1, 0, 0), (_HALF, _HALF, _HALF), (_HALF, -_HALF, _HALF), (0, 0, 1)),
    36: (
        (1 / 4, 0, 0),
        (-_SIXTH, -_SIXTH, -_SIXTH),
        (-_SIXTH, _SIXTH, -_SIXTH),
        (1 / 24, 1 / 12, _SIXTH),
        (1 / 24, -1 / 12, _SIXTH),
        (0, 0, 1),
    ),
}
_OUTPUT = {
    9: ((1, 1, 0), (0, 1, -1)),
    16: ((1, 1, 1, 0), (0, 1, -1, -1)),
    36: ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
}


def winograd_weight(weight: Tensor, taps: int) -> Tensor:
    """The transformed weight of `winograd_conv2d`, to be packed: `PackedWeight.pack(winograd_weight(w, 16), dtype)`.

    weight: (N, C, 3, 3) as in torch.nn.Conv2d, floating point. taps: 9, 16 or 36.
    Returns (taps, N, C) float32, computed in float64. Raises InputError for a wrong shape, dtype or taps.
    """
    check_tensor("weight", weight, "N C height width", (*DTYPES, torch.float64), height=3, width=3)
    check_value(is_int(taps) and taps in STEPS, "taps must be 9, 16 or 36", taps)
    transform = torch.tensor(_WEIGHT[taps], dtype=torch.float64, device=weight.device)
    by_position = weight.detach().double().flatten(2)
    products = torch.einsum("iy,jx->ijyx", transform, transform).flatten(2).flatten(0, 1)
    return torch.stack([(by_position @ row).float() for row in products])


def winograd_conv2d(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    x2: Tensor | None = None,
    affine: Tensor | None = None,
    silu: bool = False,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    upsample: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """conv2d of a 3x3 kernel with stride 1 and zero padding 1, fused with what comes before and after it.

    With a = cat([x, x2], -1), the input of the convolution is silu(a * affine[:, 0] + affine[:, 1]) * scale, of which
    any part may be missing, then enlarged to twice its size (nearest) if `upsample`; the result is
    activation(convolution + bias) + residual.

    x: (B, H, W, C1) float32, bfloat16 or float16. x2: (B, H, W, C2) likewise, maybe of another dtype. Channels that
        are next to each other are read in place, whatever the other strides; others are copied.
    weight: PackedWeight of `winograd_weight(w, taps)`, with N rows and C = C1 + C2 columns; taps must be 9 for
        `upsample`, otherwise 16 or 36. Its dtype is the precision of the products.
    bias: (N,) float32. affine: (B, 2, C) float32, scale and shift per channel (`group_norm_affine`). scale: (C,)
        float32.
    activation: None, "relu" or "silu". residual: like the result, of those dtypes; may be `out` itself.
    out_dtype: of those, too; None: x's, or that of `out`. out: where to store the result, of any strides; it must
        not overlap the inputs.
    impl: "auto", "cpu" or "reference".

    Returns out (B, H, W, N), or (B, 2H, 2W, N) with `upsample`. Inference only. Raises InputError for a wrong shape,
    dtype, device, weight or impl, and for inputs that require gradients while they are recorded.

        >>> weight = PackedWeight.pack(winograd_weight(layer.weight, 16), torch.bfloat16)
        >>> winograd_conv2d(x, weight, layer.bias, affine=group_norm_affine(x, gamma, beta, 32, 1e-6), silu=True)
    """
    channels = _gemm.check_sources(x, x2, "B H W C")
    check_flag("silu", silu)
    check_flag("upsample", upsample)
    check_choice("activation", activation, ACTIVATIONS)
    n = _gemm.check_weight(weight, channels, activation, None)
    if weight.matrices != 9 if upsample else weight.matrices not in (16, 36):
        expected = "9 taps with upsample=True" if upsample else "16 or 36 taps without upsample"
        raise InputError(f"weight must have {expected}, got {weight.matrices}")
    batch, height, width, _ = x.shape
    zoom = 2 if upsample else 1
    shape = {"B": batch, "height": height * zoom, "width": width * zoom, "N": n}
    ends = activation, residual, out, out_dtype
    shared = _gemm.check_gemm("winograd_conv2d", shape, x, x2, weight, bias, affine, scale, *ends)
    arguments = WinogradArguments(*shared, silu=silu)
    WINOGRAD_CONV2D(arguments, impl)
    return arguments.out


@dataclass(frozen=True)
class WinogradArguments(_gemm.GemmArguments):
    """Arguments of the operator; see the public function."""

    silu: bool

    def public(self) -> dict[str, Any]:
        """Return the arguments of the public function that makes these."""
        return super().public() | {"silu": self.silu, "upsample": self.weight.matrices == 9}


@functools.cache
def _transform(table: str, taps: int, device: torch.device) -> Tensor:
    return torch.tensor({"input": _INPUT, "output": _OUTPUT}[table][taps], dtype=torch.float32, device=device)


def _reference(call: WinogradArguments) -> None:
    a = _gemm_reference.prologue(
        _gemm_reference.concatenated(call.x, call.x2), call.scale_shift, call.silu, call.input_scale
    )
    inward, outward = (_transform(table, call.weight.matrices, a.device) for table in ("input", "output"))
    products = _products(_tiles(a, call.weight.matrices), inward, call.weight)
    result = torch.einsum("yi,xj,ijbrcn->brycxn", outward, outward, products)
    result = result.flatten(1, 2).flatten(2, 3)[:, : call.out.shape[1], : call.out.shape[2]]
    _gemm_reference.epilogue(result, call.bias, call.activation, call.residual, call.out)


def _tiles(a: Tensor, taps: int) -> Tensor:
    """(B, rows, columns, C, size, size), the overlapping tiles of a (B, H, W, C)."""
    step, size = STEPS[taps], len(_INPUT[taps])
    # One pixel of padding at the top and left; at the other ends also what completes the last tile.
    below, right = (-length % step + 1 for length in a.shape[1:3])
    return F.pad(a, (0, 0, 1, right, 1, below)).unfold(1, size, step).unfold(2, size, step)


def _products(tiles: Tensor, inward: Tensor, weight: PackedWeight) -> Tensor:
    """(i, j, B, rows, columns, N): the products of all taps (i, j), with both factors in the weight's precision."""
    rows = torch.einsum("iy,jx,brcdyx->ijbrcd", inward, inward, tiles)
    flat = rows.flatten(2, 4).flatten(0, 1)  # taps, tiles, channels
    if weight.scales is not None:
        steps = flat.abs().amax(2, keepdim=True).clamp_min(MIN_MAGNITUDE) / MAX_8_BITS[torch.int8]
        whole = (flat / steps).round_()
        flat = whole @ weight.numbers().float().transpose(1, 2) * steps * weight.scales[:, None]
    else:
        flat = flat.to(weight.dtype).float() @ weight.unpack().transpose(1, 2)
    return flat.unflatten(1, rows.shape[2:5]).unflatten(0, rows.shape[:2])


def _cpu(call: WinogradArguments) -> None:
    dense = call.dense()
    _native.run(
        "winograd_conv2d", shape=tuple(call.x.shape[:3]), matrices=len(call.data), **_gemm.native_arguments(dense)
    )
    call.keep(dense.out)


WINOGRAD_CONV2D = _gemm.operator("winograd_conv2d", WinogradArguments, winograd_conv2d, _cpu, _reference, gpu=False)
