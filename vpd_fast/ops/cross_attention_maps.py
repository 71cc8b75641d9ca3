"""Attention that also returns its probabilities, averaged over heads and gathered into categories.

With q_h, k_h, v_h the slices of head h:

    P_h  = softmax(scale * q_h k_h^T)                    (N, L) for each image
    out  = P_h v_h, heads side by side
    maps = addend + weight * mean_h(P_h) G               G: (L, num_categories), sum or mean over a category's tokens

Source: the cross-attention maps of VPD (Zhao et al., ICCV 2023, section 3.2). Kernels never store P_h: they need memory
for out and maps only. All of them compute scores, softmax and maps in float32 (the reference in float64 for float64).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vpd_fast.ops._attention import IMPLEMENTATIONS, Problem, Run, autocast_enabled, solve_problem
from vpd_fast.ops._attention_checks import (
    check_addend,
    check_attention,
    check_categories,
    check_flag,
    check_number,
    flat_maps,
    maps_dtype,
)
from vpd_fast.ops._categories import categories_of
from vpd_fast.ops._checks import FLOATS, check, check_impl
from vpd_fast.ops._dispatch import LIBRARY, Implementation, Op, register


def cross_attention_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    scale: float | None = None,
    categories: Tensor | Sequence[int] | None = None,
    num_categories: int | None = None,
    reduce: str = "mean",
    map_grad: bool = False,
    *,
    need_maps: bool = True,
    average_heads: bool = True,
    weight: float = 1.0,
    addend: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Multi-head attention and its head-averaged maps, without the probabilities in memory.

    q: (B, N, heads * D), projected queries. k, v: (B, L, heads * D), or (1, L, heads * D) for a context that all images
        share. All of one dtype, float32, bfloat16 or float16 (float64: by the reference), any strides.
    scale: of the scores, a number; None: D ** -0.5.
    categories: (L,) integers, tensor or sequence: category of each token, -1 for none. None: one map for each token.
    num_categories: None: the largest of `categories` plus one (reads them; give it under torch.compile).
    reduce: "mean" or "sum" over the tokens of a category; an empty category is zero.
    map_grad: let gradients flow through the maps (and to `addend`).
    need_maps: False: plain attention, maps are None. average_heads: False: one map for each head.
    weight, addend: maps are addend + weight * (what was said above), so that a mean over layers needs no second
        pass: each layer gives its share to the next. addend: of the shape and dtype of the maps; weight: a number.
    impl: "auto", "cuda", "triton", "cpu" or "reference" ("constant" is what "auto" takes for L = 1). Backward is by the
        same, or for "cuda" and "constant", which have none, by what "auto" takes.

    Returns out (B, N, heads * D) in q's dtype and maps (B, N, M), or (B, heads, N, M) without average_heads, in
    float32 (float64 for float64); M is L or num_categories. Under autocast q, k and v are cast to its dtype.
    Gradients are reverse-mode only, and once: no forward mode, no torch.func transforms, no second derivatives.
    Raises InputError for wrong shapes, dtypes, devices, categories or impl.

        >>> out, maps = cross_attention_maps(q, k, v, heads=8)
        >>> maps.sum(-1)  # ones
    """
    arguments = _check(
        *_autocast(q, k, v),
        heads,
        scale,
        categories,
        num_categories,
        reduce,
        need_maps=need_maps,
        average_heads=average_heads,
        weight=weight,
        addend=addend,
    )
    out, maps = torch.ops.vpd_fast.cross_attention_maps(*arguments, check_impl(impl))
    if not need_maps:
        return out, None
    return out, maps if map_grad else maps.detach()


def cross_attention_maps_into(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    into: Tensor,
    heads: int,
    scale: float | None = None,
    categories: Tensor | Sequence[int] | None = None,
    num_categories: int | None = None,
    reduce: str = "mean",
    *,
    weight: float = 1.0,
    accumulate: bool = False,
    addend: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`cross_attention_maps` whose maps go to memory of the caller.

    into: (B, N, M), or a feature map (B, M, h, w) with h * w = N, of any strides: a buffer, or a channel slice of a
        features tensor, contiguous or channels-last, whatever its pitch. float32, bfloat16 or float16. Its elements
        must not overlap in memory.
    accumulate: False: into = addend + weight * maps. True: into += weight * maps (float32, or float64 for float64).
    addend: (B, N, M), as in `cross_attention_maps`; not together with `accumulate`. It may be `into` itself, but must
        not overlap it otherwise.
    Others: as in `cross_attention_maps`. The maps carry no gradient; `out` does (then maps go through a temporary).

    Returns out (B, N, heads * D). Raises InputError as `cross_attention_maps` does, and for an unsuitable `into`.

        >>> sums = torch.empty(B, N, L)
        >>> for i, (q, k, v) in enumerate(layers):  # the mean over layers, on the fly
        ...     out = cross_attention_maps_into(q, k, v, sums, heads=8, weight=1 / len(layers), accumulate=i > 0)
    """
    arguments = _check_into(
        *_autocast(q, k, v),
        into,
        heads,
        scale,
        categories,
        num_categories,
        reduce,
        weight=weight,
        accumulate=accumulate,
        addend=addend,
    )
    q, k, v, into, addend, *rest = arguments
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        out, maps = torch.ops.vpd_fast.cross_attention_maps(q, k, v, addend, *rest[:-1], True, True, check_impl(impl))
        with torch.no_grad():
            into.add_(maps) if accumulate else into.copy_(maps)
        return out
    return torch.ops.vpd_fast.cross_attention_maps_into(*arguments, check_impl(impl))


def _autocast(*tensors: Any) -> tuple[Any, ...]:
    """As the matrix multiplications of attention would be under autocast; anything else is left for the checks."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not autocast_enabled(first.device):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in FLOATS else t for t in tensors)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    scale: float | None = None,
    categories: Tensor | Sequence[int] | None = None,
    num_categories: int | None = None,
    reduce: str = "mean",
    map_grad: bool = False,
    *,
    need_maps: bool = True,
    average_heads: bool = True,
    weight: float = 1.0,
    addend: Tensor | None = None,
) -> tuple:
    scale = check_attention(q, k, v, heads, scale)
    categories, count, mean = check_categories(categories, num_categories, reduce, k.shape[1], q.device)
    check_flag("need_maps", need_maps)
    check_flag("average_heads", average_heads)
    shape = (q.shape[0], q.shape[1], count) if average_heads else (q.shape[0], heads, q.shape[1], count)
    check(need_maps or addend is None, "addend needs need_maps=True")
    check_addend(addend, shape, maps_dtype(q), q.device)
    weight = check_number("weight", weight)
    return q, k, v, addend, categories, heads, scale, weight, count, mean, need_maps, average_heads


def _check_into(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    into: Tensor,
    heads: int,
    scale: float | None = None,
    categories: Tensor | Sequence[int] | None = None,
    num_categories: int | None = None,
    reduce: str = "mean",
    *,
    weight: float = 1.0,
    accumulate: bool = False,
    addend: Tensor | None = None,
) -> tuple:
    scale = check_attention(q, k, v, heads, scale)
    categories, count, mean = check_categories(categories, num_categories, reduce, k.shape[1], q.device)
    check_flag("accumulate", accumulate)
    into = flat_maps(into, q, count)
    check(into.device == q.device, f"into must be on {q.device} as q is, got {into.device}")
    check(not into.requires_grad, "into must not require gradients: the maps carry none")
    check(
        all(size <= 1 or stride != 0 for size, stride in zip(into.shape, into.stride(), strict=True)),
        f"into must not be expanded: its elements share memory (shape {tuple(into.shape)}, strides {into.stride()})",
    )
    check(
        not accumulate or into.dtype == maps_dtype(q),
        f"accumulate=True needs into in {maps_dtype(q)}, got {into.dtype}: each addition would be rounded",
    )
    check(not accumulate or addend is None, "give either accumulate=True or an addend")
    check_addend(addend, tuple(into.shape), maps_dtype(q), q.device)
    weight = check_number("weight", weight)
    return q, k, v, into, addend, categories, heads, scale, weight, count, mean, accumulate


def _functional(run: Run) -> Callable[..., tuple[Tensor, Tensor]]:
    def solve(*args: Any) -> tuple[Tensor, Tensor]:
        q, k, v, addend, categories, heads, scale, weight, num_maps, mean, need_maps, average_heads = args
        out, maps = _fake(*args)
        made = None if categories is None else categories_of(categories, num_maps, mean)
        problem = Problem(q, k, v, addend, made, heads, scale, weight, average_heads)
        solve_problem(run, problem, out, maps if need_maps else None)
        return out, maps

    return solve


def _into(run: Run) -> Callable[..., Tensor]:
    def solve(*args: Any) -> Tensor:
        q, k, v, into, addend, categories, heads, scale, weight, num_maps, mean, accumulate = args
        out = q.new_empty(q.shape)
        made = None if categories is None else categories_of(categories, num_maps, mean)
        problem = Problem(q, k, v, into if accumulate else addend, made, heads, scale, weight, True)
        solve_problem(run, problem, out, into)
        return out

    return solve


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    q, _, _, _, _, heads, _, _, num_maps, _, need_maps, average_heads = args[:12]
    batch, length, _ = q.shape
    shape = (batch, length, num_maps) if average_heads else (batch, heads, length, num_maps)
    return q.new_empty(q.shape), q.new_empty(shape if need_maps else (0,), dtype=maps_dtype(q))


def _implementations(make: Callable[[Run], Callable[..., Any]], heads: int) -> tuple[Implementation, ...]:
    """heads: position of that argument in the operator's."""
    return tuple(
        Implementation(name, make(run), lambda *args, refuse=refuse: refuse(*args[:3], args[heads]))
        for name, run, refuse in IMPLEMENTATIONS
    )


_ARGUMENTS = "Tensor? addend, Tensor? categories, int heads, float scale, float weight, SymInt num_maps, bool mean"

register(
    Op(
        name="cross_attention_maps",
        arguments=f"Tensor q, Tensor k, Tensor v, {_ARGUMENTS}, bool need_maps, bool average_heads",
        returns="(Tensor, Tensor)",
        fake=_fake,
        check=_check,
        implementations=_implementations(_functional, heads=5),
    )
)

register(
    Op(
        name="cross_attention_maps_into",
        arguments=f"Tensor q, Tensor k, Tensor v, Tensor(a!) into, {_ARGUMENTS}, bool accumulate",
        returns="Tensor",
        fake=lambda q, *_: q.new_empty(q.shape),
        check=_check_into,
        implementations=_implementations(_into, heads=6),
    )
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, _, categories, *ctx.options, _, ctx.average_heads, ctx.impl = inputs
    ctx.save_for_backward(q, k, v, categories)
    ctx.set_materialize_grads(False)


# Implementations that have a backward of their own; those of the others is chosen.
_BACKWARD = {name: name for name in ("cpu", "triton", "reference")}


def _backward(ctx: Any, grad_out: Tensor | None, grad_maps: Tensor | None) -> tuple:
    q, k, v, categories = ctx.saved_tensors
    grads = (None, None, None)
    if any(ctx.needs_input_grad[:3]) and (grad_out is not None or grad_maps is not None):
        grads = torch.ops.vpd_fast.cross_attention_maps_backward(
            grad_out, grad_maps, q, k, v, categories, *ctx.options, ctx.average_heads, _BACKWARD.get(ctx.impl, "auto")
        )
    return (*grads, grad_maps if ctx.needs_input_grad[3] else None, *(None,) * 9)


torch.library.register_autograd("vpd_fast::cross_attention_maps", _backward, setup_context=_setup_context, lib=LIBRARY)
