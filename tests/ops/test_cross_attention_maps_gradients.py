"""Autograd through cross_attention_maps; its backward operator alone is in test_cross_attention_maps_backward.py."""

from __future__ import annotations

import pytest
import torch

from vpd_fast import ops

from .attention_cases import eager, gradient_inputs


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("average_heads", [True, False])
@pytest.mark.parametrize("categories", [None, [0, 0, 2, -1, 3, 3, 3]])
def test_gradcheck(shared: bool, average_heads: bool, categories) -> None:
    options = {"categories": categories, "average_heads": average_heads, "map_grad": True, "weight": 0.3}
    if categories:
        options["num_categories"] = 5
    inputs = gradient_inputs(shared)
    shape = ops.cross_attention_maps(*inputs, 2, **options)[1].shape
    addend = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    # Along random directions, which no wrong gradient is orthogonal to.
    assert torch.autograd.gradcheck(
        lambda q, k, v, addend: ops.cross_attention_maps(q, k, v, 2, addend=addend, **options),
        (*inputs, addend),
        fast_mode=True,
    )
    maps = lambda q, k, v: ops.cross_attention_maps(q, k, v, 2, **options)[1]  # noqa: E731
    assert torch.autograd.gradcheck(maps, inputs, fast_mode=True)


def test_gradients_of_one_token_are_zero_not_missing() -> None:
    q, k, v = gradient_inputs(shared=True, tokens=1, dtype=torch.float32)
    out, _ = ops.cross_attention_maps(q, k, v, 2)
    out.sum().backward()
    assert torch.equal(q.grad, torch.zeros_like(q))
    assert torch.equal(k.grad, torch.zeros_like(k))
    assert torch.equal(v.grad, torch.full_like(v, 22.0))


def test_maps_carry_a_gradient_only_if_asked() -> None:
    inputs = gradient_inputs(shared=False, dtype=torch.float32)
    out, maps = ops.cross_attention_maps(*inputs, 2)
    assert out.requires_grad
    assert not maps.requires_grad
    expected = torch.autograd.grad(eager(*inputs, 2)[0].square().sum(), inputs)
    for actual, exact in zip(torch.autograd.grad(out.square().sum(), inputs), expected, strict=True):
        torch.testing.assert_close(actual, exact)
    _, maps = ops.cross_attention_maps(*inputs, 2, map_grad=True)
    expected = torch.autograd.grad(eager(*inputs, 2)[1].square().sum(), inputs, allow_unused=True)[:2]
    for actual, exact in zip(torch.autograd.grad(maps.square().sum(), inputs[:2]), expected, strict=True):
        torch.testing.assert_close(actual, exact)
