"""Direct convolution of NHWC images by a packed weight, with what comes before and after it fused.

A matrix product whose left factor, the inputs that each output position reads ("im2col"), exists block by block in the
cache only. For kernels, strides and sizes that `winograd_conv2d` is not made for. Precision and what is not finite: as
in `linear`; a row of 8 bits is what one output position reads, but for the Triton kernels, where it is a whole image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast import _native
from vpd_fast.errors import InputError
from vpd_fast.ops import _gemm
from vpd_fast.ops._checks import MAX_SIDE, check, check_impl, check_size, check_tensor
from vpd_fast.ops._dispatch import Implementation, Op, register
from vpd_fast.ops._gemm import DTYPES
from vpd_fast.ops._packing import PackedWeight


def conv2d(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    kernel: Sequence[int],
    stride: int = 1,
    padding: int | Sequence[int] = 0,
    x2: Tensor | None = None,
    affine: Tensor | None = None,
    silu: bool = False,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """activation(convolution + bias) + residual.

    With a = cat([x, x2], -1), the input of the convolution is silu(a * affine[:, 0] + affine[:, 1]) * scale, of which
    any part may be missing, with zeros around it.

    x: (B, H, W, C1) float32 or bfloat16. x2: (B, H, W, C2) likewise, maybe of the other dtype. Channels that are next
        to each other are read in place, whatever the other strides; others are copied.
    weight: PackedWeight of one tap, N x (kernel height * kernel width * C), C = C1 + C2, with the channels innermost:
        `PackedWeight.pack(layer.weight.permute(0, 2, 3, 1).flatten(1)[None], dtype)`. Its dtype is the precision of the
        product.
    kernel: (height, width). stride: of both axes. padding: of all sides, or (top, left, bottom, right).
    bias: (N,) float32. affine: (B, 2, C) float32 (`group_norm_affine`). scale: (C,) float32.
    activation: None, "relu", "silu" or "geglu" (see `linear`).
    residual: like the result, float32 or bfloat16; may be `out` itself.
    out_dtype: float32 or bfloat16; None: x's, or that of `out`. out: where to store the result, of any strides; it must
        not overlap the inputs.
    impl: "auto", "cpu", "triton" or "reference".

    Returns out (B, H', W', N). Inference only. Raises InputError for a wrong shape, dtype, device, weight or impl, and
    for inputs that require gradients while they are recorded.
    """
    arguments = _check(
        x,
        weight,
        bias,
        kernel=kernel,
        stride=stride,
        padding=padding,
        x2=x2,
        affine=affine,
        silu=silu,
        scale=scale,
        residual=residual,
        activation=activation,
        out_dtype=out_dtype,
        out=out,
    )
    torch.ops.vpd_fast.conv2d(*arguments, check_impl(impl))
    return arguments[-1]


def _check(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    kernel: Sequence[int],
    stride: int = 1,
    padding: int | Sequence[int] = 0,
    x2: Tensor | None = None,
    affine: Tensor | None = None,
    silu: bool = False,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> tuple:
    check_tensor("x", x, "B H W C1", DTYPES, "B")
    batch, height, width, channels = x.shape
    if x2 is not None:
        check_tensor("x2", x2, "B H W C2", DTYPES, "B", B=batch, H=height, W=width)
        channels += x2.shape[3]
    kernel = check_size("kernel", kernel)
    check(_is_integer(stride, 1), f"stride must be a positive integer, got {stride!r}")
    padding = _check_padding(padding)
    n_out = _gemm.check_weight(weight, kernel[0] * kernel[1] * channels, activation)
    _gemm.check_vectors(bias, affine, scale, n=weight.n, batch=batch, channels=channels)
    check(isinstance(silu, bool), f"silu must be True or False, got {silu!r}")
    top, left, bottom, right = padding
    sides = (height + top + bottom - kernel[0]) // stride + 1, (width + left + right - kernel[1]) // stride + 1
    if min(sides) <= 0:
        raise InputError(f"kernel {kernel} must fit into the image {height}x{width} with padding {padding}")
    shape = {"B": batch, "height": sides[0], "width": sides[1], "N": n_out}
    if residual is not None:
        check_tensor("residual", residual, "B height width N", DTYPES, "B", **shape)
    out = _gemm.check_out(out, out_dtype, x, shape)
    tensors = {"x": x, "x2": x2, "weight": weight.data, "bias": bias, "affine": affine, "scale": scale}
    _gemm.check_places("conv2d", x.device, tensors | {"residual": residual, "out": out})
    return (
        *(x, x2, weight.data, weight.scales, weight.sums, weight.n),
        *(bias, kernel, stride, padding, affine, silu, scale, activation or "", residual, out),
    )


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_SIDE


def _check_padding(padding: Any) -> tuple[int, int, int, int]:
    sides = (padding,) * 4 if isinstance(padding, int) else padding
    fits = isinstance(sides, Sequence) and len(sides) == 4 and all(_is_integer(side, 0) for side in sides)
    check(fits, f"padding must be an integer, or (top, left, bottom, right), none of them negative, got {padding!r}")
    return tuple(sides)


def _reference(
    x: Tensor,
    x2: Tensor | None,
    data: Tensor,
    scales: Tensor | None,
    sums: Tensor | None,
    n: int,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: int,
    padding: Sequence[int],
    affine: Tensor | None,
    silu: bool,
    scale: Tensor | None,
    activation: str,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    a = _gemm.prologue(_gemm.joined(x, x2), affine, silu, scale)
    top, left, bottom, right = padding
    a = F.pad(a, (0, 0, left, right, top, bottom)).unfold(1, kernel[0], stride).unfold(2, kernel[1], stride)
    rows = a.permute(0, 1, 2, 4, 5, 3).flatten(3)  # images, height, width, then what one output position reads
    result = _gemm.product(rows, PackedWeight(data, scales, sums, n, rows.shape[-1]))
    _gemm.finish(result, bias, activation, residual, out)


def _cpu(
    x: Tensor,
    x2: Tensor | None,
    data: Tensor,
    scales: Tensor | None,
    sums: Tensor | None,
    n: int,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: int,
    padding: Sequence[int],
    affine: Tensor | None,
    silu: bool,
    scale: Tensor | None,
    activation: str,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    if out.numel() == 0:
        return
    x, x2 = _gemm.last_contiguous(x), _gemm.last_contiguous(x2)
    residual, target = _gemm.evenly_spaced(residual), _gemm.evenly_spaced(out)
    k = kernel[0] * kernel[1] * (x.shape[3] + (0 if x2 is None else x2.shape[3]))
    packed = PackedWeight(data, scales, sums, n, k)
    kept, packed_addresses, vectors = _gemm.vectors_and_weight(packed, bias, affine, scale)
    _native.load("_C").conv2d(
        x=_gemm.strided(x),
        x2=_gemm.strided(x2),
        shape=(*x.shape[:3], *out.shape[1:3]),
        geometry=(*kernel, stride, *padding[:2]),
        weight=packed_addresses,
        vectors=vectors,
        silu=silu,
        activation=activation,
        residual=_gemm.strided(residual),
        out=_gemm.strided(target),
        threads=torch.get_num_threads(),
        isa=_native.isa(),
    )
    del kept
    if target.data_ptr() != out.data_ptr():
        out.copy_(target.view(out.shape))


def _triton(
    x: Tensor,
    x2: Tensor | None,
    data: Tensor,
    scales: Tensor | None,
    sums: Tensor | None,
    n: int,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: int,
    padding: Sequence[int],
    affine: Tensor | None,
    silu: bool,
    scale: Tensor | None,
    activation: str,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    if out.numel() == 0:
        return
    from vpd_fast.kernels import conv2d as kernels

    x, x2, residual, target = (_gemm.last_contiguous(t) for t in (x, x2, residual, out))
    k = kernel[0] * kernel[1] * (x.shape[3] + (0 if x2 is None else x2.shape[3]))
    weight = _gemm.triton_weight(data, n, k)
    scales, sums, bias, affine, scale = _gemm.contiguous_or_none(scales, sums, bias, affine, scale)
    prologue = {"affine": affine, "silu": silu, "scale": scale}
    geometry = {"kernel": tuple(kernel), "stride": stride, "padding": tuple(padding)}
    end = {"bias": bias, "activation": activation, "residual": residual, "out": target}
    kernels.forward(x, x2, weight, scales, sums, **prologue, **geometry, **end)
    if target is not out:
        out.copy_(target)


def _triton_refuses(x: Tensor, x2: Tensor | None, *rest: Any) -> str | None:
    return _gemm.triton_refuses(x, x2, n=rest[3], activation=rest[-3])


register(
    Op(
        name="conv2d",
        arguments=(
            "Tensor x, Tensor? x2, Tensor data, Tensor? scales, Tensor? sums, SymInt n, Tensor? bias, "
            "SymInt[2] kernel, SymInt stride, SymInt[4] padding, Tensor? affine, bool silu, Tensor? scale, "
            "str activation, Tensor? residual, Tensor(a!) out"
        ),
        returns="()",
        fake=lambda *_: None,
        check=_check,
        implementations=(
            Implementation("cpu", _cpu, _gemm.cpu_refuses),
            Implementation("triton", _triton, _triton_refuses),
            Implementation("reference", _reference),
        ),
    )
)
