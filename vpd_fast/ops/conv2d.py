"""Direct convolution of NHWC images by a packed weight, with what comes before and after it fused.

A matrix product whose left factor, the inputs that each output position reads ("im2col"), exists block by block in the
cache only. For kernels, strides and sizes that `winograd_conv2d` is not made for. Precision and what is not finite: as
in `linear`; a row of 8 bits is what one output position reads, but for the Triton kernels, where it is a whole image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast import _native
from vpd_fast.errors import InputError
from vpd_fast.ops import _gemm, _gemm_reference
from vpd_fast.ops._checks import MAX_SIDE, check_flag, check_places, check_size, check_tensor, check_value
from vpd_fast.ops._dispatch import WRITTEN, SymInt
from vpd_fast.ops._gemm import DTYPES
from vpd_fast.ops._layout import rows_contiguous
from vpd_fast.ops.packing import PackedWeight
from vpd_fast.ops.statistics import Statistics, check_statistics, fill_statistics, given


def conv2d(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    kernel: Sequence[int],
    stride: int = 1,
    padding: int | Sequence[int] = 0,
    upsample: bool = False,
    x2: Tensor | None = None,
    affine: Tensor | None = None,
    silu: bool = False,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    ranges: Tensor | None = None,
    statistics: Statistics | None = None,
    impl: str = "auto",
) -> Tensor:
    """activation(convolution + bias) + residual.

    With a = cat([x, x2], -1), the input of the convolution is silu(a * affine[:, 0] + affine[:, 1]) * scale, of which
    any part may be missing, with zeros around it.

    x: (B, H, W, C1) float32, bfloat16 or float16. x2: (B, H, W, C2) likewise, maybe of another dtype. Channels that are
        next to each other are read in place, whatever the other strides; others are copied.
    weight: PackedWeight of one matrix, N x (kernel height * kernel width * C), C = C1 + C2, channels innermost:
        `PackedWeight.pack(layer.weight.permute(0, 2, 3, 1).flatten(1)[None], dtype)`. Its dtype is the precision of the
        product.
    kernel: (height, width). stride: of both axes. padding: of all sides, or (top, left, bottom, right).
    upsample: enlarge the image to twice its size (nearest) and convolve it with a 3x3 kernel, padding 1. That is a 2x2
        convolution for each of the four phases (0,0), (0,1), (1,0), (1,1) of the result, whose weights are the four
        matrices of `weight`. kernel must be (2, 2), stride and padding what they are by default.
    bias: (N,) float32. affine: (B, 2, C) float32 (`group_norm_affine`). scale: (C,) float32.
    activation: None, "relu", "silu" or "geglu" (see `linear`).
    residual: like the result, of those dtypes; may be `out` itself.
    out_dtype: of those, too; None: x's, or that of `out`. out: where to store the result, of any strides; it must
        not overlap the inputs.
    ranges: (B, 2, parts) float32: least and largest numbers of each image that is convolved, in parts, if they are
        known (`group_norm_affine`); 8-bit kernels with one scale for an image need not look for them then.
    statistics: what to fill with statistics of the result as it is stored, for `group_norm_affine`.
    impl: "auto", "cpu", "triton", "cuda", "library" (cuBLAS and cuDNN), "cuda_rows" ("cuda" with rows prepared in CUDA
        C++, too) or "reference".

    Returns out (B, H', W', N). Inference only. Raises InputError for a wrong shape, dtype, device, weight or impl, and
    for inputs that require gradients while they are recorded.
    """
    channels = _gemm.check_sources(x, x2, "B H W C")
    batch, height, width, _ = x.shape
    kernel = check_size("kernel", kernel)
    check_value(_is_integer(stride, 1), "stride must be a positive integer", stride)
    padding = _check_padding(padding)
    check_flag("upsample", upsample)
    if upsample and (kernel, stride, any(padding)) != ((2, 2), 1, False):
        raise InputError(f"upsample needs kernel (2, 2), stride 1, padding 0, got {kernel}, {stride}, {padding}")
    matrices = 4 if upsample else 1
    n_out = _gemm.check_weight(weight, kernel[0] * kernel[1] * channels, activation, matrices)
    check_flag("silu", silu)
    top, left, bottom, right = padding
    sides = (height + top + bottom - kernel[0]) // stride + 1, (width + left + right - kernel[1]) // stride + 1
    sides = (2 * height, 2 * width) if upsample else sides
    if min(sides) <= 0:
        raise InputError(f"kernel {kernel} must fit into the image {height}x{width} with padding {padding}")
    shape = {"B": batch, "height": sides[0], "width": sides[1], "N": n_out}
    shared = _gemm.check_gemm("conv2d", shape, x, x2, weight, bias, affine, scale, activation, residual, out, out_dtype)
    if ranges is not None:
        check_tensor("ranges", ranges, "B 2 parts", DTYPES[:1], "B", **{"B": batch, "2": 2})
        check_places("conv2d", x.device, {"ranges": ranges})
    data, run = check_statistics("statistics", statistics, batch, sides[0] * sides[1], n_out, x.device)
    if upsample and height * width % run:
        raise InputError(f"statistics.run must divide the {height * width} positions of a phase, got {run}")
    arguments = Conv2dArguments(
        *shared, kernel, stride, padding, upsample, silu, ranges=ranges, statistics=data, run=run
    )
    CONV2D(arguments, impl)
    return arguments.out


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_SIDE


def _check_padding(padding: Any) -> tuple[int, int, int, int]:
    sides = (padding,) * 4 if isinstance(padding, int) else padding
    fits = isinstance(sides, Sequence) and len(sides) == 4 and all(_is_integer(side, 0) for side in sides)
    check_value(fits, "padding must be an integer, or (top, left, bottom, right), none of them negative", padding)
    top, left, bottom, right = sides
    return top, left, bottom, right


@dataclass(frozen=True)
class Conv2dArguments(_gemm.GemmArguments):
    """Arguments of the operator; see the public function."""

    kernel: Sequence[SymInt]
    stride: SymInt
    padding: Sequence[SymInt]
    upsample: bool
    silu: bool
    ranges: Tensor | None
    statistics: Annotated[Tensor | None, WRITTEN]
    run: SymInt

    def public(self) -> dict[str, Any]:
        """Return the arguments of the public function that makes these."""
        names = ("kernel", "stride", "padding", "upsample", "silu", "ranges")
        statistics = given(self.statistics, self.run)
        return super().public() | {name: getattr(self, name) for name in names} | {"statistics": statistics}

    @property
    def columns(self) -> int:
        """Number of columns of the weight: what one output position reads."""
        return self.kernel[0] * self.kernel[1] * self.channels

    @property
    def margins(self) -> Sequence[int]:
        """Zeros around the image that kernels for GPUs prepare: top, left, bottom, right."""
        return (1, 1, 1, 1) if self.upsample else self.padding

    def phases(self) -> Iterator[Conv2dArguments]:
        """The four convolutions of `upsample`, or this one."""
        if not self.upsample:
            yield self
            return
        for i in range(4):
            y, x = divmod(i, 2)
            part = self.weight.matrix(i)
            yield replace(
                self,
                data=part.data,
                scales=part.scales,
                weight_sums=part.weight_sums,
                padding=(1 - y, 1 - x, y, x),
                upsample=False,
                residual=None if self.residual is None else self.residual[:, y::2, x::2],
                out=self.out[:, y::2, x::2],
                statistics=None if self.statistics is None else self.statistics.tensor_split(4, dim=1)[i],
            )


def _reference(call: Conv2dArguments) -> None:
    a = _gemm_reference.prologue(
        _gemm_reference.concatenated(call.x, call.x2), call.scale_shift, call.silu, call.input_scale
    )
    for phase in call.phases():
        kernel, stride, (top, left, bottom, right) = phase.kernel, phase.stride, phase.padding
        padded = F.pad(a, (0, 0, left, right, top, bottom))
        patches = padded.unfold(1, kernel[0], stride).unfold(2, kernel[1], stride)
        rows = patches.permute(0, 1, 2, 4, 5, 3).flatten(3)  # images, height, width, what one output position reads
        result = _gemm_reference.gemm(rows, phase.weight, phase.ranges)
        _gemm_reference.epilogue(result, phase.bias, phase.activation, phase.residual, phase.out)
        fill_statistics(phase.out.flatten(1, 2), phase.statistics, phase.run)


def _cpu(call: Conv2dArguments) -> None:
    for phase in call.phases():
        dense = phase.dense()
        dense = replace(dense, residual=rows_contiguous(dense.residual), out=rows_contiguous(dense.out))
        _native.run(
            "conv2d",
            shape=(*phase.x.shape[:3], *phase.out.shape[1:3]),
            geometry=(*phase.kernel, phase.stride, *phase.padding[:2]),
            **_gemm.native_arguments(dense),
        )
        phase.keep(dense.out)


CONV2D = _gemm.operator("conv2d", Conv2dArguments, conv2d, _cpu, _reference)
