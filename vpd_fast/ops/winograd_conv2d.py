"""3x3 convolution with fewer multiplications: Winograd's minimal filtering of small tiles, with all that surrounds it.

A tile of outputs is a sum of products of a transformed tile of inputs with a transformed weight, one matrix product for
each tap of the transform (Lavin, Gray, "Fast algorithms for convolutional neural networks", 2015). With `taps`:

    16  F(2x2, 3x3): 2x2 outputs of 4x4 inputs, 2.25 times fewer multiplications
    36  F(4x4, 3x3): 4x4 outputs of 6x6 inputs, 4 times fewer; its rounding errors are some ten times larger
     9  F(2x2, 3x3) of an input enlarged to twice its size by repeating pixels: of the tile (a, b, b, c) one of four
        transformed inputs vanishes, so 9 of 16 taps remain, 4 times fewer, and the enlarged image is never made

Transforms and sums are float32. Before the products, transformed inputs are rounded to the precision of the weight: to
bfloat16, or to 8 bits, symmetrically, with a scale for each tile and tap. Results of tiles whose input is not finite are
not finite either; with 8-bit weights they are NaN.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast import _native
from vpd_fast.ops._checks import check, check_impl, check_tensor
from vpd_fast.ops._dispatch import Implementation, Op, register
from vpd_fast.ops._packing import LARGEST, PackedWeight

DTYPES = (torch.float32, torch.bfloat16)
ACTIVATIONS = (None, "relu", "silu")
STEPS = {9: 1, 16: 2, 36: 4}  # taps -> input pixels from one tile to the next
LEAST_MAGNITUDE = 1e-30  # of a row of 8 bits: smaller numbers become zero

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
    check_tensor("weight", weight, "N C height width", (*DTYPES, torch.float16, torch.float64), height=3, width=3)
    check(taps in STEPS, f"taps must be 9, 16 or 36, got {taps!r}")
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

    With a = cat([x, x2], -1), the input of the convolution is silu(a * affine[:, 0] + affine[:, 1]) * scale, of which any
    part may be missing, then enlarged to twice its size (nearest) if `upsample`; the result is
    activation(convolution + bias) + residual.

    x: (B, H, W, C1) float32 or bfloat16; x2: (B, H, W, C2) likewise, maybe of the other dtype. Channels that are next to
        each other are read in place, whatever the other strides; others are copied.
    weight: PackedWeight of `winograd_weight(w, taps)`, with N rows and C = C1 + C2 columns; taps must be 9 for
        `upsample`, otherwise 16 or 36. Its dtype is the precision of the products.
    bias: (N,) float32. affine: (B, 2, C) float32, scale and shift per channel (`group_norm_affine`). scale: (C,) float32.
    activation: None, "relu" or "silu". residual: like the result, float32 or bfloat16; may be `out` itself.
    out_dtype: float32 or bfloat16; None: x's, or that of `out`. out: where to store the result, with channels next to
        each other; it must not overlap the inputs.
    impl: "auto", "cpu" or "reference".

    Returns out (B, H, W, N), or (B, 2H, 2W, N) with `upsample`. Inference only. Raises InputError for a wrong shape, dtype,
    device, weight or impl, and for inputs that require gradients while they are recorded.
    """
    arguments = _check(
        x,
        weight,
        bias,
        x2=x2,
        affine=affine,
        silu=silu,
        scale=scale,
        residual=residual,
        activation=activation,
        upsample=upsample,
        out_dtype=out_dtype,
        out=out,
    )
    torch.ops.vpd_fast.winograd_conv2d(*arguments, check_impl(impl))
    return arguments[-1]


def _check(
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
) -> tuple:
    check_tensor("x", x, "B H W C1", DTYPES, may_be_empty="B")
    batch, height, width, channels = x.shape
    if x2 is not None:
        check_tensor("x2", x2, "B H W C2", DTYPES, may_be_empty="B", B=batch, H=height, W=width)
        channels += x2.shape[3]
    n = _check_weight(weight, channels, upsample)
    for name, value, shape in (("bias", bias, "N"), ("affine", affine, "B 2 C"), ("scale", scale, "C")):
        if value is not None:
            sizes = {"N": n, "B": batch, "2": 2, "C": channels}
            check_tensor(name, value, shape, (torch.float32,), "B", **{word: sizes[word] for word in shape.split()})
    for name, flag in (("silu", silu), ("upsample", upsample)):
        check(isinstance(flag, bool), f"{name} must be True or False, got {flag!r}")
    check(activation in ACTIVATIONS, f"activation must be None, 'relu' or 'silu', got {activation!r}")
    zoom = 2 if upsample else 1
    shape = {"B": batch, "height": height * zoom, "width": width * zoom, "N": n}
    if residual is not None:
        check_tensor("residual", residual, "B height width N", DTYPES, "B", **shape)
    check(out_dtype in (None, *DTYPES), f"out_dtype must be None, float32 or bfloat16, got {out_dtype!r}")
    if out is None:
        out = x.new_empty(tuple(shape.values()), dtype=out_dtype or x.dtype)
    _check_out(out, out_dtype, shape)
    tensors = {"x2": x2, "weight": weight.data, "bias": bias, "affine": affine, "scale": scale, "residual": residual}
    _check_places(x, tensors | {"out": out})
    return (
        *(x, x2, weight.data, weight.scales, weight.sums),
        *(n, bias, affine, silu, scale, activation or "", residual, out),
    )


def _check_weight(weight: PackedWeight, channels: int, upsample: bool) -> int:
    """The weight's rows."""
    kind = type(weight).__name__
    check(isinstance(weight, PackedWeight), f"weight must be a PackedWeight of winograd_weight(...), got {kind}")
    check(weight.k == channels, f"weight must have the {channels} columns of the input's channels, got {weight.k}")
    expected = "9 taps with upsample=True" if upsample else "16 or 36 taps without upsample"
    fits = weight.taps == 9 if upsample else weight.taps in (16, 36)
    check(fits, f"weight must have {expected}, got {weight.taps}")
    return weight.n


def _check_out(out: Tensor, out_dtype: torch.dtype | None, shape: dict[str, int]) -> None:
    check_tensor("out", out, "B height width N", DTYPES, "B", **shape)
    check(out_dtype in (None, out.dtype), f"out must be of out_dtype={out_dtype}, got {out.dtype}")
    check(
        out.stride(3) == 1 or out.shape[3] == 1,
        f"out must have its channels next to each other, got strides {out.stride()}",
    )
    check(
        all(size <= 1 or stride != 0 for size, stride in zip(out.shape, out.stride(), strict=True)),
        f"out must not be expanded: its elements share memory (shape {tuple(out.shape)}, strides {out.stride()})",
    )


def _check_places(x: Tensor, others: dict[str, Tensor | None]) -> None:
    for name, tensor in {"x": x, **others}.items():
        if tensor is None:
            continue
        check(tensor.device == x.device, f"{name} must be on {x.device} as x is, got {tensor.device}")
        check(
            not (torch.is_grad_enabled() and tensor.requires_grad),
            f"{name} requires gradients, which winograd_conv2d does not compute: call it under torch.no_grad()",
        )


@functools.cache
def _transform(table: str, taps: int, device: torch.device) -> Tensor:
    return torch.tensor({"input": _INPUT, "output": _OUTPUT}[table][taps], dtype=torch.float32, device=device)


def _reference(
    x: Tensor,
    x2: Tensor | None,
    data: Tensor,
    scales: Tensor | None,
    sums: Tensor | None,
    n: int,
    bias: Tensor | None,
    affine: Tensor | None,
    silu: bool,
    scale: Tensor | None,
    activation: str,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    a = x.float() if x2 is None else torch.cat([x.float(), x2.float()], dim=3)
    if affine is not None:
        a = a * affine[:, 0, None, None] + affine[:, 1, None, None]
    a = F.silu(a) if silu else a
    a = a if scale is None else a * scale
    weight = PackedWeight(data, scales, sums, n, a.shape[3])
    inward, outward = (_transform(table, weight.taps, x.device) for table in ("input", "output"))
    products = _products(_tiles(a, weight.taps), inward, weight)
    result = torch.einsum("yi,xj,ijbrcn->brycxn", outward, outward, products)
    result = result.flatten(1, 2).flatten(2, 3)[:, : out.shape[1], : out.shape[2]]
    result = result if bias is None else result + bias
    if activation:
        result = F.relu(result) if activation == "relu" else F.silu(result)
    out.copy_(result if residual is None else result + residual)


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
    if weight.dtype == torch.int8:
        largest = flat.abs().amax(2, keepdim=True).clamp_min(LEAST_MAGNITUDE)
        whole = (flat * (LARGEST / largest)).round_()
        flat = whole @ weight.numbers().float().transpose(1, 2) * (largest / LARGEST) * weight.scales[:, None]
    else:
        flat = flat.to(weight.dtype).float() @ weight.unpack().transpose(1, 2)
    return flat.unflatten(1, rows.shape[2:5]).unflatten(0, rows.shape[:2])


def _cpu_refuses(x: Tensor, *_: Any) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}, not on the CPU"
    return _native.why_missing("_C")


def _cpu(
    x: Tensor,
    x2: Tensor | None,
    data: Tensor,
    scales: Tensor | None,
    sums: Tensor | None,
    n: int,
    bias: Tensor | None,
    affine: Tensor | None,
    silu: bool,
    scale: Tensor | None,
    activation: str,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    if x.shape[0] == 0:
        return
    x, x2, residual = (None if t is None else _rows(t) for t in (x, x2, residual))
    numbers = [None if t is None else t.contiguous() for t in (data, scales, sums, bias, affine, scale)]
    data, scales, sums, bias, affine, scale = (None if t is None else t.data_ptr() for t in numbers)
    _native.load("_C").winograd_conv2d(
        taps=numbers[0].shape[0],
        shape=tuple(x.shape[:3]),
        x=_strided(x),
        x2=_strided(x2),
        precision=str(numbers[0].dtype).removeprefix("torch."),
        weight=data,
        scales=scales,
        sums=sums,
        bias=bias,
        affine=affine,
        factor=scale,
        silu=silu,
        activation=activation,
        residual=_strided(residual),
        out=_strided(out),
        threads=torch.get_num_threads(),
        isa=_native.isa(),
    )


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _strided(x: Tensor | None) -> tuple | None:
    return None if x is None else (x.data_ptr(), x.dtype == torch.bfloat16, x.shape[3], x.stride()[:3])


register(
    Op(
        name="winograd_conv2d",
        arguments=(
            "Tensor x, Tensor? x2, Tensor data, Tensor? scales, Tensor? sums, SymInt n, Tensor? bias, Tensor? affine, "
            "bool silu, Tensor? scale, str activation, Tensor? residual, Tensor(a!) out"
        ),
        returns="()",
        fake=lambda *_: None,
        check=_check,
        implementations=(
            Implementation("cpu", _cpu, _cpu_refuses),
            Implementation("reference", _reference),
        ),
    )
)
