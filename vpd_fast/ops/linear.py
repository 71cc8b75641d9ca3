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
from vpd_fast.ops._checks import check, check_choice, check_eps, check_not_expanded, check_places, check_tensor
from vpd_fast.ops._dispatch import WRITTEN, SymInt
from vpd_fast.ops.packing import PackedWeight
from vpd_fast.ops.rounding import check_rounding, round_columns
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
    rounding: Tensor | None = None,
    x_rounding: Tensor | None = None,
    x_out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """activation(prologue(cat([x, x2], -1)) @ weight.T + bias) + residual.

    x: (B, M, K1) float32, bfloat16 or float16. x2: (B, M, K2) likewise, maybe of another dtype. Channels that are next
        to each other are read in place, whatever the other strides; others are copied. Both may be int8 instead, if
        the weight is: numbers that were rounded by what made them (`rounding`), which are multiplied as they are, by
        the weight and its scales. There is no prologue then, and the result has the dtype that is asked for.
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
    rounding: (2, N) float32, factors and shifts by which the result is rounded to int8 (`vpd_fast.ops.rounding`); there
        are no statistics then.
    x_rounding, x_out: (2, K1) float32 and (B, M, K1) int8, with channels next to each other: where x is to be stored as
        well, rounded by those factors and shifts; where norm="layer", since who prepares those rows reads it anyway.
    impl: "auto", "cpu", "triton", "cuda", "library" (cuBLAS and cuDNN), "cuda_rows" ("cuda" with rows prepared in CUDA
        C++, too) or "reference".

    Returns out (B, M, N), for geglu (B, M, N // 2). Inference only. Raises InputError for a wrong shape, dtype, device,
    weight or impl, and for inputs that require gradients while they are recorded.

        >>> weight = PackedWeight.pack(layer.weight[None], torch.int8)
        >>> linear(x, weight, layer.bias, residual=x)
    """
    is_rounded = isinstance(x, Tensor) and x.dtype == _gemm.ROUNDED
    k = _gemm.check_sources(x, x2, "B M K", (_gemm.ROUNDED,) if is_rounded else _gemm.DTYPES)
    n_out = _gemm.check_weight(weight, k, activation)
    check_choice("norm", norm, (None, "layer"))
    eps = check_eps(eps)
    check_rounding("rounding", rounding, n_out)
    if is_rounded:
        check(weight.dtype == torch.int8, f"weight must be int8 as x is, got {weight.dtype}")
        check(norm is None and affine is None and scale is None, "x is int8, which has no prologue")
        known = out is not None or out_dtype is not None or rounding is not None
        check(known, "out_dtype must be given for x in int8")
    shape = {"B": x.shape[0], "M": x.shape[1], "N": n_out}
    out_dtypes = _gemm.DTYPES
    if rounding is not None:
        check(statistics is None, "statistics are of results that are not rounded")
        out_dtypes = (_gemm.ROUNDED,)
        out_dtype = _gemm.ROUNDED if out is None and out_dtype is None else out_dtype
    shared = _gemm.check_gemm(
        "linear", shape, x, x2, weight, bias, affine, scale, activation, residual, out, out_dtype, out_dtypes
    )
    data, run = check_statistics("statistics", statistics, x.shape[0], x.shape[1], n_out, x.device)
    _check_copy(x, norm, x_rounding, x_out)
    check_places("linear", x.device, {"rounding": rounding, "x_rounding": x_rounding, "x_out": x_out})
    rounded = {"rounding": rounding, "x_rounding": x_rounding, "x_out": x_out}
    arguments = LinearArguments(*shared, norm=norm == "layer", eps=eps, statistics=data, run=run, **rounded)
    LINEAR(arguments, impl)
    return arguments.out


def _check_copy(x: Tensor, norm: str | None, x_rounding: Tensor | None, x_out: Tensor | None) -> None:
    """Raises InputError unless x can be stored in x_out, rounded by x_rounding, or neither is given."""
    check((x_rounding is None) == (x_out is None), "x_rounding and x_out belong together")
    if x_out is None:
        return
    check(norm == "layer", 'x_out is for norm="layer"')
    check_rounding("x_rounding", x_rounding, x.shape[2])
    check_tensor("x_out", x_out, "B M K1", (_gemm.ROUNDED,), "B", B=x.shape[0], M=x.shape[1], K1=x.shape[2])
    check_not_expanded("x_out", x_out)
    check(x_out.stride(2) == 1 or x.shape[2] == 1, "x_out must have channels next to each other")


@dataclass(frozen=True)
class LinearArguments(_gemm.GemmArguments):
    """Arguments of the operator; see the public function."""

    norm: bool
    eps: float
    statistics: Annotated[Tensor | None, WRITTEN]
    run: SymInt
    rounding: Tensor | None
    x_rounding: Tensor | None
    x_out: Annotated[Tensor | None, WRITTEN]

    def public(self) -> dict[str, Any]:
        """Return the arguments of the public function that makes these."""
        norm = "layer" if self.norm else None
        more = {name: getattr(self, name) for name in ("eps", "rounding", "x_rounding", "x_out")}
        return super().public() | more | {"norm": norm, "statistics": given(self.statistics, self.run)}


def _reference(call: LinearArguments) -> None:
    a = _gemm_reference.concatenated(call.x, call.x2)
    if call.x_out is not None and call.x_rounding is not None:
        call.x_out.copy_(round_columns(call.x, call.x_rounding))
    if call.norm:
        a = a - a.mean(-1, keepdim=True)
        a = a * (a.square().mean(-1, keepdim=True) + call.eps).rsqrt()
    a = _gemm_reference.prologue(a, call.scale_shift, False, call.input_scale)
    result = _gemm_reference.gemm(a, call.weight, is_rounded=call.is_rounded)
    _gemm_reference.epilogue(result, call.bias, call.activation, call.residual, call.out, call.rounding)
    fill_statistics(call.out, call.statistics, call.run)


def _cpu(call: LinearArguments) -> None:
    dense = call.dense()
    _native.run("linear", shape=tuple(call.x.shape[:2]), norm=call.norm, eps=call.eps, **_gemm.native_arguments(dense))
    call.keep(dense.out)


LINEAR = _gemm.operator("linear", LinearArguments, linear, _cpu, _reference)
