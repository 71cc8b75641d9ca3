"""Gradients of `cross_attention_maps`. The probabilities are computed again; only q, k and v are kept from the forward.

With t = weight * grad_maps G^T (over heads, if the maps are their mean), the same for every head:

    dP = dO v^T + t;   dS = P (dP - rowsum(P dP));   dq = scale dS k;   dk = scale dS^T q;   dv = P^T dO
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vpd_fast import _native
from vpd_fast.errors import InputError
from vpd_fast.ops._attention import (
    Problem,
    address_and_strides,
    cpu_refuses,
    image_and_row_strides,
    last_contiguous,
    no_autocast,
    triton_refuses,
)
from vpd_fast.ops._attention_checks import (
    check_attention,
    check_categories,
    check_flag,
    check_number,
    maps_dtype,
)
from vpd_fast.ops._categories import categories_of
from vpd_fast.ops._checks import check, check_impl, check_tensor
from vpd_fast.ops._dispatch import LIBRARY, Implementation, Op, never_refuses, register


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
    arguments = _check(
        grad_out,
        grad_maps,
        q,
        k,
        v,
        heads,
        scale,
        categories,
        num_categories,
        reduce,
        average_heads=average_heads,
        weight=weight,
    )
    return torch.ops.vpd_fast.cross_attention_maps_backward(*arguments, check_impl(impl))


def _check(
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
) -> tuple:
    scale = check_attention(q, k, v, heads, scale)
    categories, count, mean = check_categories(categories, num_categories, reduce, k.shape[1], q.device)
    batch, length, width = q.shape
    check(grad_out is not None or grad_maps is not None, "grad_out and grad_maps are both None")
    if grad_out is not None:
        sizes = {"B": batch, "N": length, "heads*D": width}
        check_tensor("grad_out", grad_out, "B N heads*D", (q.dtype,), may_be_empty="B N", **sizes)
    if grad_maps is not None:
        words = "B N maps" if average_heads else "B heads N maps"
        sizes = {"B": batch, "heads": heads, "N": length, "maps": count}
        check_tensor("grad_maps", grad_maps, words, (maps_dtype(q),), may_be_empty=words, **sizes)
    for name, grad in (("grad_out", grad_out), ("grad_maps", grad_maps)):
        check(grad is None or grad.device == q.device, f"{name} must be on {q.device} as q is")
    check_flag("average_heads", average_heads)
    weight = check_number("weight", weight)
    return grad_out, grad_maps, q, k, v, categories, heads, scale, weight, count, mean, average_heads


# Each implementation fills dq, dk and dv, which are contiguous.
Run = Callable[["Tensor | None", "Tensor | None", Problem, Tensor, Tensor, Tensor], None]


def _reference(
    grad_out: Tensor | None, grad_maps: Tensor | None, p: Problem, dq: Tensor, dk: Tensor, dv: Tensor
) -> None:
    if grad_maps is not None:
        grad_maps = grad_maps * (p.weight / p.heads if p.average_heads else p.weight)
        if p.categories is not None:
            grad_maps = grad_maps @ p.categories.matrix(grad_maps.dtype).T

    def slices(head: int, *tensors: Tensor) -> list[Tensor]:
        return [x.unflatten(-1, (p.heads, -1))[:, :, head] for x in tensors]

    # One head at a time: less memory, for probabilities that exist only here.
    for head in range(p.heads):
        q, k, v = (x.to(maps_dtype(p.q)) for x in slices(head, p.q, p.k, p.v))
        probabilities = torch.softmax(q @ k.transpose(-2, -1) * p.scale, dim=-1)
        grad_probabilities = torch.zeros_like(probabilities)
        if grad_out is not None:
            (do,) = (x.to(q.dtype) for x in slices(head, grad_out))
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


def _cpu(grad_out: Tensor | None, grad_maps: Tensor | None, p: Problem, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    # There are no kernels for 16 bits: in training on a CPU, weights and what is added up are float32.
    q, k, v = (last_contiguous(x).float() for x in (p.q, p.k, p.v))
    grads = [x if x.dtype == torch.float32 else torch.empty_like(x, dtype=torch.float32) for x in (dq, dk, dv)]
    if grad_out is not None:
        grad_out = last_contiguous(grad_out).float()
    _native.load("_C").cross_attention_maps_backward(
        (q.data_ptr(), k.data_ptr(), v.data_ptr()),
        (q.shape[0], k.shape[0], q.shape[1], k.shape[1], p.heads, q.shape[2] // p.heads),
        tuple(image_and_row_strides(x) for x in (q, k, v)),
        None if grad_out is None else (grad_out.data_ptr(), image_and_row_strides(grad_out)),
        address_and_strides(grad_maps),
        tuple(grad.data_ptr() for grad in grads),
        None if p.categories is None else (p.categories.ids.data_ptr(), p.categories.weights.data_ptr()),
        0 if grad_maps is None else grad_maps.shape[-1],
        p.scale,
        p.weight / p.heads if p.average_heads else p.weight,
        torch.get_num_threads(),
        _native.isa(),
    )
    for grad, target in zip(grads, (dq, dk, dv), strict=True):
        if grad is not target:
            target.copy_(grad)


def _triton(grad_out: Tensor | None, grad_maps: Tensor | None, p: Problem, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    from vpd_fast.kernels import cross_attention_maps_backward as kernels

    if grad_out is not None:
        grad_out = last_contiguous(grad_out)
    q, k, v = (last_contiguous(x) for x in (p.q, p.k, p.v))
    kernels.backward(grad_out, grad_maps, q, k, v, dq, dk, dv, **p.for_kernels())


def _triton_refuses(q: Tensor, k: Tensor, v: Tensor, heads: int) -> str | None:
    reason = triton_refuses(q, k, v, heads)
    if reason is not None:
        return reason
    from vpd_fast.kernels import cross_attention_maps_backward as kernels

    return kernels.refuse(q, k, v, heads)


_IMPLEMENTATIONS: tuple[tuple[str, Run, Callable[..., str | None]], ...] = (
    ("cpu", _cpu, cpu_refuses),
    ("triton", _triton, _triton_refuses),
    ("reference", _reference, never_refuses),
)


def _solver(run: Run) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def solve(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        grad_out, grad_maps, q, k, v, categories, heads, scale, weight, num_maps, mean, average_heads = args
        grads = _fake(*args)
        made = None if categories is None else categories_of(categories, num_maps, mean)
        problem = Problem(q, k, v, None, made, heads, scale, weight, average_heads)
        if not q.numel():
            return tuple(grad.zero_() for grad in grads)
        with no_autocast(q.device):
            run(grad_out, grad_maps, problem, *grads)
        return grads

    return solve


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, q, k, v = args[:5]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


register(
    Op(
        name="cross_attention_maps_backward",
        arguments=(
            "Tensor? grad_out, Tensor? grad_maps, Tensor q, Tensor k, Tensor v, Tensor? categories, "
            "int heads, float scale, float weight, SymInt num_maps, bool mean, bool average_heads"
        ),
        returns="(Tensor, Tensor, Tensor)",
        fake=_fake,
        check=_check,
        implementations=tuple(
            Implementation(name, _solver(run), lambda *args, refuse=refuse: refuse(*args[2:5], args[6]))
            for name, run, refuse in _IMPLEMENTATIONS
        ),
    )
)


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise InputError("cross_attention_maps has no second derivatives: use the plain attention where you need them")


torch.library.register_autograd("vpd_fast::cross_attention_maps_backward", _no_second_derivative, lib=LIBRARY)
