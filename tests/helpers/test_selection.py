"""The selection of cases contains every value, and every pair as far as there is room."""

from __future__ import annotations

import itertools

import pytest

from .selection import MAX_CASES, covering, numbered


def values_and_pairs(cases):
    return {part for case in cases for count in (1, 2) for part in itertools.combinations(enumerate(case), count)}


@pytest.mark.parametrize("sizes", [(1,), (5,), (3, 4), (17, 4, 3), (2, 3, 3, 2), (2, 2, 2, 2, 2)])
def test_every_pair_is_covered(sizes):
    product = [*itertools.product(*map(range, sizes))]
    chosen = [product[i] for i in covering(product, limit=len(product))]
    assert values_and_pairs(chosen) == values_and_pairs(product)
    assert len(chosen) <= 2 * sorted([1, *sizes])[-1] * sorted([1, *sizes])[-2]


def test_every_value_is_covered_first():
    product = [*itertools.product(range(17), range(4), range(3))]
    chosen = [product[i] for i in covering(product, limit=5)]
    assert len(chosen) == 17
    for parameter in range(3):
        assert {case[parameter] for case in chosen} == {case[parameter] for case in product}


def test_products_with_holes():
    cases = [(0, 0), (1, 1), (1, 1), (2, 0)]
    assert covering(cases) == [0, 1, 3]


def test_values_that_are_written_alike_are_one():
    cases = [{"x": 1.0, "how": {"a": 2}}, {"x": 1.0, "how": {"a": 3}}, {"x": float("nan"), "how": {"a": 2}}]
    assert numbered(cases) == [[0, 0], [0, 1], [1, 0]]


@pytest.mark.parametrize("impl", ["triton"])
@pytest.mark.parametrize("side", range(12))
@pytest.mark.parametrize("word", ["a", "b"])
def test_cases_of_this_run(request, impl, side, word):
    """Stands for an interpreted kernel: by the selection, 12 of 24 cases run by default, with both words."""
    cases = [item for item in request.session.items if getattr(item, "originalname", "") == "test_cases_of_this_run"]
    default = [item.callspec.params for item in cases if "slow" not in item.keywords]
    if len(cases) >= 12 > MAX_CASES:  # not a part of them that was asked for
        assert {case["side"] for case in default} == {*range(12)}
        assert {case["word"] for case in default} == {"a", "b"}
        assert len(default) == 12
