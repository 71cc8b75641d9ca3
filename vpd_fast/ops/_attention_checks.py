"""Checks of the arguments that the attention operators share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vpd_fast.errors import InputError, brief
from vpd_fast.ops._checks import FLOATS, MAX_FLOAT32, check, check_choice, check_tensor, check_value, is_int

QKV_DTYPES = (*FLOATS, torch.float64)
REDUCTIONS = ("mean", "sum")
MAX_CATEGORIES = 2**31 - 1


def check_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None) -> float:
    """Checks what all operators on q, k and v share and returns the scale. Raises InputError."""
    check_value(is_int(heads) and heads > 0, "heads must be a positive int", heads)
    check_tensor("q", q, "B N heads*D", QKV_DTYPES, may_be_empty="B N")
    batch, _, width = q.shape
    # Messages of sizes are made where they are needed only: made under torch.compile, they would fix the sizes.
    if width % heads:
        raise InputError(f"heads={heads} must divide the width of q, got q of shape {tuple(q.shape)}")
    check_tensor("k", k, "B L heads*D", QKV_DTYPES, may_be_empty="B", **{"heads*D": width})
    check_tensor("v", v, "B L heads*D", QKV_DTYPES, may_be_empty="B", L=k.shape[1], **{"heads*D": width})
    for name, other in (("k", k), ("v", v)):
        check(
            other.dtype == q.dtype and other.device == q.device,
            f"{name} must be {q.dtype} on {q.device} as q is, got {other.dtype} on {other.device}",
        )
        if other.shape[0] not in (1, batch):
            raise InputError(f"{name} must have a batch of 1 or {batch} as q has, got shape {tuple(other.shape)}")
    if k.shape[0] != v.shape[0]:
        raise InputError(f"k and v must have the same batch, got {k.shape[0]} and {v.shape[0]}")
    return (width // heads) ** -0.5 if scale is None else check_number("scale", scale)


def check_number(name: str, value: Any) -> float:
    """A Python number as float. Raises InputError for anything else and for what float32 cannot hold."""
    good = isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)
    check_value(good and -MAX_FLOAT32 <= value <= MAX_FLOAT32, f"{name} must be a finite Python number", value)
    return float(value)


def check_categories(
    categories: Tensor | Sequence[int] | None,
    num_categories: int | None,
    reduce: str,
    tokens: int,
    device: torch.device,
) -> tuple[Tensor | None, int, bool]:
    """(categories, number of maps, reduce == "mean"). Raises InputError; the ids are checked when they are read."""
    check_choice("reduce", reduce, REDUCTIONS)
    if categories is None:
        if num_categories is not None:
            raise InputError(f"num_categories={brief(num_categories)} needs categories")
        return None, tokens, reduce == "mean"
    if not isinstance(categories, Tensor):
        good = isinstance(categories, Sequence) and not isinstance(categories, (str, bytes))
        good = good and all(is_int(i) and abs(i) <= MAX_CATEGORIES for i in categories)
        check_value(good, f"categories must be a tensor or sequence of {tokens} integers", categories)
        if num_categories is None:
            num_categories = max(categories, default=-1) + 1
            check(num_categories > 0, "categories are all negative: give num_categories")
        categories = torch.tensor(categories, dtype=torch.int64, device=device)
    check_tensor("categories", categories, "L", (torch.int64, torch.int32), L=tokens)
    check(categories.device == device, f"categories must be on {device} as q is, got {categories.device}")
    if num_categories is None:
        check(not categories.is_meta, "categories have no values on the meta device: give num_categories")
        num_categories = int(categories.max()) + 1
        check(num_categories > 0, "categories are all negative: give num_categories")
    good = is_int(num_categories) and 0 < num_categories <= MAX_CATEGORIES
    check_value(good, "num_categories must be a positive int of 31 bits", num_categories)
    return categories, num_categories, reduce == "mean"


def check_maps_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    scale: float | None,
    categories: Tensor | Sequence[int] | None,
    num_categories: int | None,
    reduce: str,
    weight: float,
) -> dict[str, Any]:
    """Checks what all operators with maps share and returns it as the fields of `MapsArguments`. Raises InputError."""
    scale = check_attention(q, k, v, heads, scale)
    ids, count, mean = check_categories(categories, num_categories, reduce, k.shape[1], q.device)
    shared = {"q": q, "k": k, "v": v, "heads": heads, "scale": scale, "ids": ids, "num_maps": count, "mean": mean}
    return shared | {"weight": check_number("weight", weight)}


def check_addend(addend: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if addend is not None:
        words = "B N maps" if len(shape) == 3 else "B heads N maps"
        sizes = dict(zip(words.split(), shape, strict=True))
        check_tensor("addend", addend, words, (dtype,), may_be_empty=words, **sizes)
        check(addend.device == device, f"addend must be on {device} as q is, got {addend.device}")


def maps_dtype(q: Tensor) -> torch.dtype:
    """float32, or float64 for float64 queries."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def flat_maps(into: Any, q: Tensor, count: int) -> Tensor:
    """`into` as (B, N, M), sharing its memory."""
    dtypes = tuple(dict.fromkeys((*FLOATS, maps_dtype(q))))
    batch, length, _ = q.shape
    if isinstance(into, Tensor) and into.dim() == 4:
        check_tensor("into", into, "B maps h w", dtypes, may_be_empty="B maps h w", B=batch, maps=count)
        height, width = into.shape[2:]
        check(height * width == length, f"into must have h*w = N = {length}, got shape {tuple(into.shape)}")
        check(
            height == 1 or width == 1 or into.stride(2) == width * into.stride(3),
            f"into must have rows that follow each other (stride(2) = w * stride(3)), got strides {into.stride()}",
        )
        return into.view(batch, count, length).transpose(1, 2)
    check_tensor("into", into, "B N maps", dtypes, may_be_empty="B N", B=batch, N=length, maps=count)
    return into
