"""Which cases of a product of parameters run by default where they take long: each of them, or all together.

Of interpreted and emulated cases those run by default that together contain every value of every parameter, and pairs
of values as far as MAX_CASES allow. Native kernels and references run whole products, but of those of an operator with
more than MAX_PRODUCT cases only as many as contain every pair of values. All others are marked slow. Cases that once
failed are kept by the marker `always`.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest

MAX_CASES = 7  # of a test function, or as many as its values need
MAX_PRODUCT = 100


def covering(cases: Sequence[Sequence[int]], limit: int = MAX_CASES) -> list[int]:
    """Returns the positions of the cases to run, in order; each case is the number of each of its parameters' values.

    Greedy: single values count most until all are there, whatever the limit, then pairs, so that a selection cut at
    `limit` is the widest.
    """
    parts = [[*_parts(case)] for case in cases]
    missing = {part: _weight(part) for case in parts for part in case}
    left, values = [*range(len(cases))], sum(len(part) == 1 for part in missing)
    chosen: list[int] = []
    while left and missing and (len(chosen) < limit or values):
        best = max(left, key=lambda i: (sum(map(missing.get, parts[i], itertools.repeat(0))), -i))
        left.remove(best)
        chosen.append(best)
        for part in parts[best]:
            values -= missing.pop(part, 0) >= _weight((0,))
    return sorted(chosen)


def numbered(cases: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Returns the parameters of each case as numbers of their distinct values, those that are written alike.

    pytest's own `callspec.indices` count sets of parameters, so that each case would have values of its own.
    """
    values: dict[str, dict[str, int]] = defaultdict(dict)
    return [[values[name].setdefault(repr(value), len(values[name])) for name, value in case.items()] for case in cases]


def _parts(case: Sequence[int]) -> Iterator[tuple]:
    """Its values and pairs of values, each with the parameters' positions."""
    values = [*enumerate(case)]
    yield from ((value,) for value in values)
    yield from itertools.combinations(values, 2)


def _weight(part: tuple) -> int:
    return 1000 if len(part) == 1 else 1


def is_interpreted(item: pytest.Item) -> bool:
    """Whether a test runs Triton's interpreter or emulated CUDA kernels, once for each of its cases."""
    params: dict[str, Any] = item.callspec.params
    if {"triton", "emulated"} & {value for value in params.values() if isinstance(value, str)}:
        return True
    folder = item.path.parent.name
    return (folder in ("kernels", "ops") and params.get("device") == "cpu") or (
        folder == "native" and "cuda" in item.fixturenames
    )


def mark_what_a_selection_leaves_out(items: Iterable[pytest.Item]) -> None:
    """Marks as slow the cases that the selection leaves out."""
    functions: dict[tuple[Any, str, bool], list[pytest.Item]] = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and "gpu" not in item.keywords:
            functions[item.path, item.originalname, is_interpreted(item)].append(item)
    for (path, _, interpreted), cases in functions.items():
        if not interpreted and (len(cases) <= MAX_PRODUCT or path.parent.name != "ops"):
            continue
        limit = MAX_CASES if interpreted else len(cases)
        chosen = covering(numbered([item.callspec.params for item in cases]), limit)
        for i in set(range(len(cases))) - set(chosen):
            if "always" not in cases[i].keywords:
                cases[i].add_marker(pytest.mark.slow)
