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

from vpd_fast.ops._attention import (
    IMPLEMENTATIONS,
    CrossAttentionMapsArguments,
    CrossAttentionMapsIntoArguments,
    Run,
    autocast_enabled,
    shape_of,
    solve,
)
from vpd_fast.ops._attention_checks import (
    check_addend,
    check_maps_arguments,
    flat_maps,
    maps_dtype,
)
from vpd_fast.ops._checks import FLOATS, check, check_flag, check_not_expanded, check_places
from vpd_fast.ops._dispatch import LIBRARY, Implementation, Op, register
from vpd_fast.ops.cross_attention_maps_backward import (
    CROSS_ATTENTION_MAPS_BACKWARD,
    CrossAttentionMapsBackwardArguments,
)
from vpd_fast.ops.rounding import check_rounding


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
    impl: "auto", "cuda", "triton", "wgmma" (on GPUs of compute capability 9.0; not "auto"'s), "cpu" or "reference"
        ("constant" is what "auto" takes for L = 1). Backward is by the same, or for "cuda", "wgmma" and "constant",
        which have none, by what "auto" takes.

    Returns out (B, N, heads * D) in q's dtype and maps (B, N, M), or (B, heads, N, M) without average_heads, in
    float32 (float64 for float64); M is L or num_categories. Under autocast q, k and v are cast to its dtype.
    Gradients are reverse-mode only, and once: no forward mode, no torch.func transforms, no second derivatives.
    Raises InputError for wrong shapes, dtypes, devices, categories or impl.

        >>> out, maps = cross_attention_maps(q, k, v, heads=8)
        >>> maps.sum(-1)  # ones
    """
    q, k, v = _autocast(q, k, v)
    shared = check_maps_arguments(q, k, v, heads, scale, categories, num_categories, reduce, weight)
    count = shared["num_maps"]
    for name, flag in (("map_grad", map_grad), ("need_maps", need_maps), ("average_heads", average_heads)):
        check_flag(name, flag)
    shape = (q.shape[0], q.shape[1], count) if average_heads else (q.shape[0], heads, q.shape[1], count)
    check(need_maps or addend is None, "addend needs need_maps=True")
    check_addend(addend, shape, maps_dtype(q), q.device)
    arguments = CrossAttentionMapsArguments(**shared, addend=addend, need_maps=need_maps, average_heads=average_heads)
    out, maps = CROSS_ATTENTION_MAPS(arguments, impl)
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
    rounding: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`cross_attention_maps` whose maps go to memory of the caller.

    into: (B, N, M), or a feature map (B, M, h, w) with h * w = N, of any strides: a buffer, or a channel slice of a
        features tensor, contiguous or channels-last, whatever its pitch. float32, bfloat16 or float16. Its elements
        must not overlap in memory.
    accumulate: False: into = addend + weight * maps. True: into += weight * maps (float32, or float64 for float64).
    addend: (B, N, M), as in `cross_attention_maps`; not together with `accumulate`. It may be `into` itself, but must
        not overlap it otherwise.
    rounding: (2, heads * D) float32, factors and shifts by which the output is rounded to int8
        (`vpd_fast.ops.rounding`), without gradients; by "triton", "constant" and "reference".
    Others: as in `cross_attention_maps`. The maps carry no gradient; `out` does (then maps go through a temporary).

    Returns out (B, N, heads * D), with a rounding int8. Raises InputError as `cross_attention_maps` does, and for an
    unsuitable `into`.

        >>> sums = torch.empty(B, N, L)
        >>> for i, (q, k, v) in enumerate(layers):  # the mean over layers, on the fly
        ...     out = cross_attention_maps_into(q, k, v, sums, heads=8, weight=1 / len(layers), accumulate=i > 0)
    """
    q, k, v = _autocast(q, k, v)
    shared = check_maps_arguments(q, k, v, heads, scale, categories, num_categories, reduce, weight)
    check_flag("accumulate", accumulate)
    into = flat_maps(into, q, shared["num_maps"])
    check(into.device == q.device, f"into must be on {q.device} as q is, got {into.device}")
    check(not into.requires_grad, "into must not require gradients: the maps carry none")
    check_not_expanded("into", into)
    check(
        not accumulate or into.dtype == maps_dtype(q),
        f"accumulate=True needs into in {maps_dtype(q)}, got {into.dtype}: each addition would be rounded",
    )
    check(not accumulate or addend is None, "give either accumulate=True or an addend")
    check_addend(addend, tuple(into.shape), maps_dtype(q), q.device)
    check_rounding("rounding", rounding, q.shape[2])
    if rounding is not None:
        check_places(
            "cross_attention_maps_into with a rounding", q.device, {"q": q, "k": k, "v": v, "rounding": rounding}
        )
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        functional = CrossAttentionMapsArguments(**shared, addend=addend, need_maps=True, average_heads=True)
        out, maps = CROSS_ATTENTION_MAPS(functional, impl)
        with torch.no_grad():
            into.add_(maps) if accumulate else into.copy_(maps)
        return out
    options = {"accumulate": accumulate, "rounding": rounding}
    arguments = CrossAttentionMapsIntoArguments(**shared, base=addend, into=into, **options)
    return CROSS_ATTENTION_MAPS_INTO(arguments, impl)


def _autocast(*tensors: Any) -> tuple[Any, ...]:
    """Casts tensors as autocast would for matrix multiplications; anything else is left for the checks."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not autocast_enabled(first.device):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in FLOATS else t for t in tensors)


def _functional(run: Run) -> Callable[[CrossAttentionMapsArguments], tuple[Tensor, Tensor]]:
    def allocate_and_run(call: CrossAttentionMapsArguments) -> tuple[Tensor, Tensor]:
        out, maps = _fake(call)
        solve(run, call, out, maps if call.need_maps else None)
        return out, maps

    return allocate_and_run


def _into(run: Run) -> Callable[[CrossAttentionMapsIntoArguments], Tensor]:
    def allocate_and_run(call: CrossAttentionMapsIntoArguments) -> Tensor:
        out = _fake_into(call)
        solve(run, call, out, call.into)
        return out

    return allocate_and_run


def _fake(call: CrossAttentionMapsArguments) -> tuple[Tensor, Tensor]:
    batch, queries, _ = call.q.shape
    shape = (batch, queries, call.num_maps) if call.average_heads else (batch, call.heads, queries, call.num_maps)
    return call.q.new_empty(call.q.shape), call.q.new_empty(shape if call.need_maps else (0,), dtype=maps_dtype(call.q))


def _fake_into(call: CrossAttentionMapsIntoArguments) -> Tensor:
    return call.q.new_empty(call.q.shape, dtype=call.q.dtype if call.rounding is None else torch.int8)


CROSS_ATTENTION_MAPS = register(
    Op(
        "cross_attention_maps",
        CrossAttentionMapsArguments,
        public=cross_attention_maps,
        returns="(Tensor, Tensor)",
        fake=_fake,
        shape=shape_of,
        implementations=tuple(Implementation(name, _functional(run), refuse) for name, run, refuse in IMPLEMENTATIONS),
    )
)

CROSS_ATTENTION_MAPS_INTO = register(
    Op(
        "cross_attention_maps_into",
        CrossAttentionMapsIntoArguments,
        public=cross_attention_maps_into,
        returns="Tensor",
        fake=_fake_into,
        shape=shape_of,
        measured_as="cross_attention_maps",
        implementations=tuple(Implementation(name, _into(run), refuse) for name, run, refuse in IMPLEMENTATIONS),
    )
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *flat, ctx.impl = inputs
    call = CrossAttentionMapsArguments(*flat)
    ctx.save_for_backward(call.q, call.k, call.v, call.ids)
    names = ("heads", "scale", "num_maps", "mean", "weight", "average_heads")
    ctx.options = {name: getattr(call, name) for name in names}
    ctx.set_materialize_grads(False)


# Implementations that have a backward of their own; that of the others is chosen.
_BACKWARD = {name: name for name in ("cpu", "triton", "reference")}


def _backward(ctx: Any, grad_out: Tensor | None, grad_maps: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, ids = ctx.saved_tensors
    names = CrossAttentionMapsArguments.__match_args__
    needed = dict(zip(names, ctx.needs_input_grad, strict=False))
    grads: dict[str, Tensor | None] = dict.fromkeys((*names, "impl"))
    if (needed["q"] or needed["k"] or needed["v"]) and (grad_out is not None or grad_maps is not None):
        arguments = CrossAttentionMapsBackwardArguments(
            q=q, k=k, v=v, ids=ids, grad_out=grad_out, grad_maps=grad_maps, **ctx.options
        )
        impl = _BACKWARD.get(ctx.impl, "auto")
        grads["q"], grads["k"], grads["v"] = CROSS_ATTENTION_MAPS_BACKWARD(arguments, impl)
    if needed["addend"]:
        grads["addend"] = grad_maps
    return tuple(grads.values())


torch.library.register_autograd("vpd_fast::cross_attention_maps", _backward, setup_context=_setup_context, lib=LIBRARY)
