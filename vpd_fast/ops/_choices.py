"""In which order "auto" asks the implementations of an operator on a GPU: the fastest that was measured first.

Times are in the table of the GPU (`kernels/tables.py`), by operator, by a key of what decides which program runs (such
as dtype and kernel size), and by sizes. What has no times within a factor of NEAR goes by the order of the operator's
list. Both are the same in every process and in every call, and nothing is timed.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from vpd_fast.kernels import tables

NEAR = 2.0  # product of the ratios of all sizes up to which times of another shape are taken over
MAX_REMEMBERED = 4096  # shapes whose order is remembered
BY_LIST = "the order of the list"
WORDS = {  # of dtypes in keys; tensor cores take as long for one kind of 16 bits as for the other
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "16-bit",
    torch.float16: "16-bit",
    torch.int8: "int8",
    torch.float8_e4m3fn: "fp8",
}


class Shape(NamedTuple):
    """What decides which implementation is fastest: a key, and sizes, which may be near those of an entry."""

    key: str
    sizes: tuple[int, ...]


class Order(NamedTuple):
    """Names of implementations in the order in which "auto" asks them, and what says so, in words."""

    names: tuple[str, ...]
    by: str


@functools.lru_cache(maxsize=MAX_REMEMBERED)
def order(operator: str, names: tuple[str, ...], device: torch.device, shape: Shape) -> Order:
    """Return the order for a shape on a GPU.

    operator: under whose name its times are. names: of all implementations, in the order of the list, which is that of
    those without times, too.
    """
    table, words = tables.of_device(device)
    if table is None:
        return Order(names, f"{BY_LIST} ({words})")
    times = nearest(table.choices.get((operator, shape.key), ()), shape.sizes)
    if times is None:
        sizes = "x".join(map(str, shape.sizes))
        return Order(names, f"{BY_LIST} ({words} has nothing near {operator} {shape.key} {sizes})")
    fastest = tuple(name for name in times.microseconds if name in names)
    return Order(
        (*fastest, *(name for name in names if name not in fastest)), f"{words}: {operator} {shape.key} {times}"
    )


def nearest(recorded: tuple[tables.Times, ...], sizes: tuple[int, ...]) -> tables.Times | None:
    """Return the times of the nearest sizes, if they are near enough; of two that are as near, those of the smaller."""
    near = [(distance(times.sizes, sizes), times) for times in recorded if len(times.sizes) == len(sizes)]
    best = min(near, key=lambda pair: pair[0], default=None)
    return best[1] if best is not None and best[0] <= NEAR else None


def distance(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Return the product of the ratios of sizes, the larger over the smaller: 1 if they are equal."""
    return math.prod(max(x, y) / max(1, min(x, y)) for x, y in zip(a, b, strict=True))


def forget() -> None:
    """Forget what was decided and read, so that tables are read again."""
    order.cache_clear()
    tables.forget()
