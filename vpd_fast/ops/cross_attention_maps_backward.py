"""Gradients of `cross_attention_maps`. The probabilities are computed again; only q, k and v are kept from the forward.

With t = weight * grad_maps G^T (over heads, if the maps are their mean), the same for every head:

    dP = dO v^T + t;   dS = P (dP - rowsum(P dP));   dq = scale dS k;   dk = scale dS^T q;   dv = P^T dO
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vpd_fast import _native
from vpd_fast.errors import InputError
from vpd_fast.ops._attention import MapsArguments, cpu_refuses, kernel_options, no_autocast, triton_refuses
from vpd_fast.ops._attention_checks import check_maps_arguments, maps_dtype
from vpd_fast.ops._categories import category_addresses
from vpd_fast.ops._checks import check, check_flag, check_tensor
from vpd_fast.ops._dispatch import LIBRARY, Implementation, Op, register
from vpd_fast.ops._layout import address_and_strides, last_contiguous, leading_strides


def cross_attention_maps_backward(
    grad_out: Tensor | None,
    grad_maps: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    scale: float | None = None,
    categories: Tensor | Sequence[int] | None = None,
    num_categories: int | None = None,
    reduce: str = "mean",
    *,
    average_heads: bool = True,
    weight: float = 1.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; autograd calls it.

    grad_out: (B, N, heads * D) in q's dtype, or None for zero. grad_maps: of the shape and dtype of the maps, or None.
    Others: as in `cross_attention_maps`. impl: "auto", "cpu", "triton" or "reference".

    Returns dq (B, N, heads * D), dk and dv, of the shapes of k and v: summed over the images if they share a context.
    There are no second derivatives.
    Raises InputError for wrong shapes, dtypes, devices, categories or impl.
    """
    shared = check_maps_arguments(q, k, v, heads, scale, categories, num_categories, reduce, weight)
    batch, length, width = q.shape
    check_flag("average_heads", average_heads)
    check(grad_out is not None or grad_maps is not None, "grad_out and grad_maps are both None")
    if grad_out is not None:
        sizes = {"B": batch, "N": length, "heads*D": width}
        check_tensor("grad_out", grad_out, "B N heads*D", (q.dtype,), may_be_empty="B N", **sizes)
    if grad_maps is not None:
        words = "B N maps" if average_heads else "B heads N maps"
        sizes = {"B": batch, "heads": heads, "N": length, "maps": shared["num_maps"]}
        check_tensor("grad_maps", grad_maps, words, (maps_dtype(q),), may_be_empty=words, **sizes)
    for name, grad in (("grad_out", grad_out), ("grad_maps", grad_maps)):
        check(grad is None or grad.device == q.device, f"{name} must be on {q.device} as q is")
    arguments = CrossAttentionMapsBackwardArguments(
        **shared, grad_out=grad_out, grad_maps=grad_maps, average_heads=average_heads
    )
    return CROSS_ATTENTION_MAPS_BACKWARD(arguments, impl)


@dataclass(frozen=True)
class CrossAttentionMapsBackwardArguments(MapsArguments):
    """Arguments of the operator; see the public function."""

    grad_out: Tensor | None
    grad_maps: Tensor | None
    average_heads: bool

    @property
    def head_weight(self) -> float:
        """Weight of each head's probabilities in the maps."""
        return self.weight / self.heads if self.average_heads else self.weight


# Each implementation fills dq, dk and dv, which are contiguous.
Run = Callable[[CrossAttentionMapsBackwardArguments, Tensor, Tensor, Tensor], None]


def _reference(p: CrossAttentionMapsBackwardArguments, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    grad_maps = p.grad_maps
    if grad_maps is not None:
        grad_maps = grad_maps * p.head_weight
        if p.categories is not None:
            grad_maps = grad_maps @ p.categories.matrix(grad_maps.dtype).T

    def slices(head: int, *tensors: Tensor) -> list[Tensor]:
        return [x.unflatten(-1, (p.heads, -1))[:, :, head] for x in tensors]

    # One head at a time: less memory, for probabilities that exist only here.
    for head in range(p.heads):
        q, k, v = (x.to(maps_dtype(p.q)) for x in slices(head, p.q, p.k, p.v))
        probabilities = torch.softmax(q @ k.transpose(-2, -1) * p.scale, dim=-1)
        grad_probabilities = torch.zeros_like(probabilities)
        if p.grad_out is not None:
            (do,) = (x.to(q.dtype) for x in slices(head, p.grad_out))
            grad_probabilities += do @ v.transpose(-2, -1)
            grad_v = probabilities.transpose(-2, -1) @ do
        else:
            grad_v = torch.zeros_like(v)
        if grad_maps is not None:
            grad_probabilities += grad_maps if p.average_heads else grad_maps[:, head]
        delta = (probabilities * grad_probabilities).sum(-1, keepdim=True)
        grad_scores = probabilities * (grad_probabilities - delta) * p.scale
        for target, grad in zip(
            slices(head, dq, dk, dv), (grad_scores @ k, grad_scores.transpose(-2, -1) @ q, grad_v), strict=True
        ):
            shared = target.shape[0] == 1 and grad.shape[0] != 1
            target.copy_(grad.sum(0, keepdim=True) if shared else grad)


def _cpu(p: CrossAttentionMapsBackwardArguments, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    # There are no kernels for 16 bits: in training on a CPU, weights and what is added up are float32.
    q, k, v = (x.float() for x in p.contiguous_qkv)
    grads = [x if x.dtype == torch.float32 else torch.empty_like(x, dtype=torch.float32) for x in (dq, dk, dv)]
    grad_out = None if p.grad_out is None else last_contiguous(p.grad_out).float()
    _native.run(
        "cross_attention_maps_backward",
        p.native_arguments(q, k, v),
        None if grad_out is None else (grad_out.data_ptr(), leading_strides(grad_out)),
        address_and_strides(p.grad_maps),
        tuple(grad.data_ptr() for grad in grads),
        (category_addresses(p.categories), 0 if p.grad_maps is None else p.grad_maps.shape[-1], p.head_weight),
        torch.get_num_threads(),
        _native.isa(),
    )
    for grad, target in zip(grads, (dq, dk, dv), strict=True):
        if grad is not target:
            target.copy_(grad)


def _triton(p: CrossAttentionMapsBackwardArguments, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    from vpd_fast.kernels import cross_attention_maps_backward as kernels

    kernels.backward(last_contiguous(p.grad_out), p.grad_maps, *p.contiguous_qkv, dq, dk, dv, **kernel_options(p))


def _triton_refuses(p: CrossAttentionMapsBackwardArguments) -> str | None:
    reason = triton_refuses(p)
    if reason is not None:
        return reason
    from vpd_fast.kernels import cross_attention_maps_backward as kernels

    return kernels.refuse(p.q, p.k, p.v, p.heads)


def _fake(p: CrossAttentionMapsBackwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    return p.q.new_empty(p.q.shape), p.k.new_empty(p.k.shape), p.v.new_empty(p.v.shape)


def _allocating(run: Run) -> Callable[[CrossAttentionMapsBackwardArguments], tuple[Tensor, Tensor, Tensor]]:
    def allocate_and_run(p: CrossAttentionMapsBackwardArguments) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = _fake(p)
        if not p.q.numel():
            return dq.zero_(), dk.zero_(), dv.zero_()
        with no_autocast(p.q.device):
            run(p, dq, dk, dv)
        return dq, dk, dv

    return allocate_and_run


CROSS_ATTENTION_MAPS_BACKWARD = register(
    Op(
        "cross_attention_maps_backward",
        CrossAttentionMapsBackwardArguments,
        public=cross_attention_maps_backward,
        returns="(Tensor, Tensor, Tensor)",
        fake=_fake,
        implementations=(
            Implementation("cpu", _allocating(_cpu), cpu_refuses),
            Implementation("triton", _allocating(_triton), _triton_refuses),
            Implementation("reference", _allocating(_reference)),
        ),
    )
)


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise InputError("cross_attention_maps has no second derivatives: use the plain attention where you need them")


torch.library.register_autograd("vpd_fast::cross_attention_maps_backward", _no_second_derivative, lib=LIBRARY)
