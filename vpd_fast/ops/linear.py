"""Rows times a packed weight, with what comes before and after it fused.

Rows are made, normalised and rounded block by block, multiplied while they are in the cache, and the sums go through
bias, activation and residual before they are stored: nothing but inputs, weight and result touches memory.

All arithmetic but the product itself is float32. Its factors have the precision of the weight: float32, bfloat16 (sums
in float32), or 8 bits with a scale for each row (`rounding.py` says how rows are rounded). What is not finite in a row
makes its results not finite; with 8-bit weights, NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from vpd_fast import _native
from vpd_fast.ops import _gemm, _gemm_reference
from vpd_fast.ops._checks import check_choice, check_eps
from vpd_fast.ops._dispatch import WRITTEN, SymInt
from vpd_fast.ops.packing import PackedWeight
from vpd_fast.ops.statistics import Statistics, check_statistics, fill_statistics, given


def linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    x2: Tensor | None = None,
    norm: str | None = None,
    eps: float = 1e-5,
    affine: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    statistics: Statistics | None = None,
    impl: str = "auto",
) -> Tensor:
    """activation(prologue(cat([x, x2], -1)) @ weight.T + bias) + residual.

    x: (B, M, K1) float32, bfloat16 or float16. x2: (B, M, K2) likewise, maybe of another dtype. Channels that are next
        to each other are read in place, whatever the other strides; others are copied.
    weight: PackedWeight of one matrix, N x K with K = K1 + K2. Its dtype is the precision of the product.
    The prologue, of which any part may be missing, in this order:
        norm: "layer": (a - mean) / sqrt(variance + eps) over the row, without parameters.
        affine: (B, 2, K) float32: a * affine[:, 0] + affine[:, 1] (`group_norm_affine`).
        scale: (K,) float32: a * scale.
    bias: (N,) float32. activation: None, "relu", "silu", or "geglu", for which the rows of the weight are in the order
        of `geglu_rows(N // 2)`: value * gelu(gate), with the exact gelu.
    residual: like the result, of those dtypes; may be `out` itself.
    out_dtype: of those, too; None: x's, or that of `out`. out: where to store the result, of any strides; it must
        not overlap the inputs.
    statistics: what to fill with statistics of the result as it is stored, for `group_norm_affine`.
    impl: "auto", "cpu", "triton", "cuda", "library" (cuBLAS and cuDNN), "cuda_rows" ("cuda" with rows prepared in CUDA
        C++, too) or "reference".

    Returns out (B, M, N), for geglu (B, M, N // 2). Inference only. Raises InputError for a wrong shape, dtype, device,
    weight or impl, and for inputs that require gradients while they are recorded.

        >>> weight = PackedWeight.pack(layer.weight[None], torch.int8)
        >>> linear(x, weight, layer.bias, residual=x)
    """
    k = _gemm.check_sources(x, x2, "B M K")
    n_out = _gemm.check_weight(weight, k, activation)
    check_choice("norm", norm, (None, "layer"))
    eps = check_eps(eps)
    shape = {"B": x.shape[0], "M": x.shape[1], "N": n_out}
    shared = _gemm.check_gemm("linear", shape, x, x2, weight, bias, affine, scale, activation, residual, out, out_dtype)
    data, run = check_statistics("statistics", statistics, x.shape[0], x.shape[1], n_out, x.device)
    arguments = LinearArguments(*shared, norm=norm == "layer", eps=eps, statistics=data, run=run)
    LINEAR(arguments, impl)
    return arguments.out


@dataclass(frozen=True)
class LinearArguments(_gemm.GemmArguments):
    """Arguments of the operator; see the public function."""

    norm: bool
    eps: float
    statistics: Annotated[Tensor | None, WRITTEN]
    run: SymInt

    def public(self) -> dict[str, Any]:
        """Return the arguments of the public function that makes these."""
        norm = "layer" if self.norm else None
        return super().public() | {"norm": norm, "eps": self.eps, "statistics": given(self.statistics, self.run)}


def _reference(call: LinearArguments) -> None:
    a = _gemm_reference.concatenated(call.x, call.x2)
    if call.norm:
        a = a - a.mean(-1, keepdim=True)
        a = a * (a.square().mean(-1, keepdim=True) + call.eps).rsqrt()
    a = _gemm_reference.prologue(a, call.scale_shift, False, call.input_scale)
    result = _gemm_reference.gemm(a, call.weight)
    _gemm_reference.epilogue(result, call.bias, call.activation, call.residual, call.out)
    fill_statistics(call.out, call.statistics, call.run)


def _cpu(call: LinearArguments) -> None:
    dense = call.dense()
    _native.load("_C").linear(
        shape=tuple(call.x.shape[:2]), norm=call.norm, eps=call.eps, **_gemm.native_arguments(dense)
    )
    call.keep(dense.out)


LINEAR = _gemm.operator("linear", LinearArguments, linear, _cpu, _reference)
