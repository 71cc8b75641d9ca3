"""Attention of every position to every position, without the probabilities in memory.

With q_h, k_h, v_h the slices of head h: out = softmax(scale * q_h k_h^T) v_h, heads side by side.

The kernel reads keys piece by piece and keeps probabilities relative to a score near the largest so far (Milakov and
Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022), so it needs memory
for a packed copy of k and v only. Scores, softmax and sums are float32; for bfloat16, where the machine multiplies
such numbers, the probabilities are rounded to bfloat16 for the second product, and their sum is of the rounded ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast import _native
from vpd_fast.ops._attention import ROUNDING_REFUSED, AttentionArguments, no_autocast, split_heads, triton_refuses
from vpd_fast.ops._attention_checks import QKV_DTYPES, check_attention, maps_dtype
from vpd_fast.ops._checks import check, check_not_expanded, check_places, check_tensor
from vpd_fast.ops._choices import WORDS, Shape
from vpd_fast.ops._dispatch import WRITTEN, Implementation, Op, register
from vpd_fast.ops._layout import last_contiguous, leading_strides
from vpd_fast.ops.availability import triton_missing
from vpd_fast.ops.rounding import check_rounding, put

CPU_DTYPES = (torch.float32, torch.bfloat16)
MAX_SDPA_SCORES = 1 << 28  # at a time, where PyTorch's only kernels need a matrix of scores


def self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    scale: float | None = None,
    out: Tensor | None = None,
    *,
    rounding: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Multi-head attention.

    q: (B, N, heads * D). k, v: (B, M, heads * D), or (1, M, heads * D) for all images; k and v may be one tensor. All
        of one dtype, float32 or bfloat16 (float16, float64: by the reference). Any strides; read in place if the last
        is 1, such as slices of one fused projection.
    scale: of the scores, a number; None: D ** -0.5.
    out: where the result goes, of q's shape and dtype, any strides but expanded; must not share memory with the inputs.
        None: allocated.
    rounding: (2, heads * D) float32, factors and shifts by which the result is rounded to int8, which `out` then is
        (`vpd_fast.ops.rounding`); by "triton", "cuda" and "reference".
    impl: "auto", "cpu", "triton", "sdpa" (PyTorch's scaled_dot_product_attention), "cuda" (wgmma, for heads of up to
        160 channels and GPUs of compute capability 9.0; never by "auto" yet) or "reference".

    Returns out. A query with a score of NaN or infinity gets NaN, but for "sdpa", which some scores of infinity give
    zero. Inference only. Raises InputError for wrong shapes,
    dtypes, devices, scale or impl, and for tensors that require gradients while they are recorded.

        >>> q, k, v = qkv.chunk(3, dim=-1)
        >>> out = self_attention(q, k, v, heads=8)
    """
    scale = check_attention(q, k, v, heads, scale)
    batch, length, width = q.shape
    check_rounding("rounding", rounding, width)
    dtype = q.dtype if rounding is None else torch.int8
    if out is None:
        out = q.new_empty(q.shape, dtype=dtype)
    check_tensor("out", out, "B N heads*D", (*QKV_DTYPES, dtype), "B N", B=batch, N=length, **{"heads*D": width})
    check(
        out.dtype == dtype and out.device == q.device,
        f"out must be {dtype} on {q.device} as q is, got {out.dtype} on {out.device}",
    )
    check_not_expanded("out", out)
    check_places("self_attention", q.device, {"q": q, "k": k, "v": v, "out": out, "rounding": rounding})
    SELF_ATTENTION(SelfAttentionArguments(q=q, k=k, v=v, heads=heads, scale=scale, out=out, rounding=rounding), impl)
    return out


@dataclass(frozen=True)
class SelfAttentionArguments(AttentionArguments):
    """Arguments of the operator; see the public function."""

    out: Annotated[Tensor, WRITTEN]
    rounding: Tensor | None


def _reference(call: SelfAttentionArguments) -> None:
    with no_autocast(call.q.device):
        q, k, v = (split_heads(x, call.heads, maps_dtype(call.q)) for x in (call.q, call.k, call.v))
        probabilities = torch.softmax(q @ k.transpose(-2, -1) * call.scale, dim=-1)
        put(call.out, (probabilities @ v).transpose(1, 2).flatten(2), call.rounding)


def _cpu_refuses(call: SelfAttentionArguments) -> str | None:
    if call.q.device.type != "cpu":
        return f"q is on {call.q.device}, not on the CPU"
    if call.q.dtype not in CPU_DTYPES:
        return f"q is {call.q.dtype}, not {' or '.join(map(str, CPU_DTYPES))}"
    if call.rounding is not None:
        return ROUNDING_REFUSED
    return _native.why_missing("_C")


def _cpu(call: SelfAttentionArguments) -> None:
    if not call.out.numel():
        return
    result = call.out if call.out.stride(-1) == 1 else torch.empty(call.out.shape, dtype=call.out.dtype)
    qkv = call.contiguous_qkv  # which must live while the kernel runs
    place = result.data_ptr(), leading_strides(result)
    _native.run("self_attention", call.native_arguments(*qkv), place, torch.get_num_threads(), _native.isa())
    if result is not call.out:
        call.out.copy_(result)


def _triton(call: SelfAttentionArguments) -> None:
    out = call.out
    if not out.numel():
        return
    from vpd_fast.kernels import cross_attention_maps as narrow
    from vpd_fast.kernels import self_attention as wide

    result = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    if call.sizes[-1] > narrow.MAX_HEAD_DIM:
        wide.forward(*call.contiguous_qkv, result, heads=call.heads, scale=call.scale)
    else:
        options = {"heads": call.heads, "scale": call.scale, "weight": 1.0, "categories": None, "average_heads": True}
        rounding = last_contiguous(call.rounding)
        narrow.forward(*call.contiguous_qkv, result, None, None, **options, rounding=rounding)
    if result is not out:
        out.copy_(result)


def _triton_refuses(call: SelfAttentionArguments) -> str | None:
    if call.q.dtype == torch.float64:
        return "q is float64"
    reason = triton_missing(call.q, "q")
    if reason is not None:
        return reason
    from vpd_fast.kernels import cross_attention_maps as narrow
    from vpd_fast.kernels import self_attention as wide

    if call.sizes[-1] > narrow.MAX_HEAD_DIM and call.rounding is not None:
        return ROUNDING_REFUSED
    if call.sizes[-1] > narrow.MAX_HEAD_DIM:
        return wide.refuse(call.q, call.k, call.v)
    return triton_refuses(call)


def _sdpa_refuses(call: SelfAttentionArguments) -> str | None:
    q = call.q
    if q.device.type not in ("cpu", "cuda"):
        return f"q is on {q.device}, neither on the CPU nor on a GPU"
    if call.rounding is not None:
        return ROUNDING_REFUSED
    # PyTorch has only the reference's way for it on a GPU; float64 is for exactness, so it goes there everywhere.
    return "q is float64" if q.dtype == torch.float64 else None


def _sdpa_dtype(q: Tensor) -> torch.dtype:
    """Returns float32 for bfloat16 on old GPUs, where PyTorch's kernels without a matrix of scores refuse it."""
    old = q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < (8, 0)
    return torch.float32 if old and q.dtype == torch.bfloat16 else q.dtype


def _sdpa(call: SelfAttentionArguments) -> None:
    q, k, out, heads = call.q, call.k, call.out, call.heads
    if not out.numel():
        return
    dim = call.sizes[-1]
    queries = q if k.shape[0] == q.shape[0] else q.reshape(1, -1, q.shape[2])  # of all images, if they share keys
    with no_autocast(q.device):
        # Some of PyTorch's kernels take heads of whole 16 bytes only; zeros add nothing to a score.
        queries, keys, values = (
            F.pad(split_heads(x, heads, _sdpa_dtype(q)), (0, -dim % 8)) for x in (queries, k, call.v)
        )
        at_once = max(1, MAX_SDPA_SCORES // (queries.shape[0] * heads * k.shape[1]))
        parts = [
            F.scaled_dot_product_attention(part, keys, values, scale=call.scale)
            for part in queries.split(at_once, dim=2)
        ]
        result = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        out.copy_(result[..., :dim].transpose(1, 2).reshape(out.shape))


def _cuda_refuses(call: SelfAttentionArguments) -> str | None:
    from vpd_fast.kernels import _attention_cuda as kernel

    return kernel.refuse(call.q, call.k, call.v, call.heads, call.scale)


def _cuda(call: SelfAttentionArguments) -> None:
    out = call.out
    if not out.numel():
        return
    from vpd_fast.kernels import _attention_cuda as kernel

    result = out if kernel.writable(out) else torch.empty_like(out, memory_format=torch.contiguous_format)
    rounding = last_contiguous(call.rounding)
    kernel.forward(call.q, call.k, call.v, result, heads=call.heads, scale=call.scale, rounding=rounding)
    if result is not out:
        out.copy_(result)


def _shape_of(call: SelfAttentionArguments) -> Shape:
    """Returns what decides which implementation is fastest; sizes: queries of all images and heads, keys."""
    batch, queries, keys, heads, dim = call.sizes
    return Shape(f"{WORDS[call.q.dtype]} {dim}", (batch * heads * queries, keys))


SELF_ATTENTION = register(
    Op(
        "self_attention",
        SelfAttentionArguments,
        public=self_attention,
        shape=_shape_of,
        implementations=(
            Implementation("cpu", _cpu, _cpu_refuses),
            Implementation("triton", _triton, _triton_refuses),
            Implementation("sdpa", _sdpa, _sdpa_refuses),
            Implementation("cuda", _cuda, _cuda_refuses),  # not measured yet: "sdpa" takes all that it does
            Implementation("reference", _reference),
        ),
    )
)
