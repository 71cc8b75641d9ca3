"""Gradients of cross_attention_maps against those that autograd finds for plain PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vpd_fast import ops
from vpd_fast.errors import InputError

from .attention_cases import assert_close, eager, kernel_and_place, make_qkv
from .variants import ISAS

IMPLEMENTATIONS = [
    *(pytest.param((f"cpu:{isa}", "cpu"), id=f"cpu-{isa}") for isa in ISAS),
    pytest.param(("reference", "cpu"), id="reference"),
    *(pytest.param((name, "cuda"), marks=pytest.mark.gpu, id=f"{name}-gpu") for name in ("triton", "reference")),
]


@pytest.fixture(params=IMPLEMENTATIONS)
def where(request, monkeypatch) -> dict:
    """{"impl", "device", "dtype"}: every implementation, the CPU kernel once per instruction set level."""
    return kernel_and_place(request, monkeypatch)


def exact_gradients(inputs: tuple[Tensor, ...], heads: int, grad_out, grad_maps, dtype, **kwargs) -> list[Tensor]:
    """By autograd, in the given dtype."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
    out, maps = eager(*leaves, heads, **kwargs)
    total = 0 if grad_out is None else (out * grad_out.to(out.dtype)).sum()
    if grad_maps is not None:
        total = total + (maps * grad_maps.to(maps.dtype)).sum()
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]


def check_backward(where: dict, q: Tensor, k: Tensor, v: Tensor, heads: int, use: str = "both", **kwargs) -> None:
    generator = torch.Generator().manual_seed(3)
    out, maps = eager(q.float(), k.float(), v.float(), heads, **kwargs)
    grad_out = torch.randn(out.shape, generator=generator).to(q) if use != "maps" else None
    # Of the size that makes the two parts of the gradient comparable.
    grad_maps = (10 * torch.randn(maps.shape, generator=generator)).to(q.device) if use != "out" else None
    actual = ops.cross_attention_maps_backward(grad_out, grad_maps, q, k, v, heads, **kwargs, impl=where["impl"])
    exact = exact_gradients((q, k, v), heads, grad_out, grad_maps, torch.float64, **kwargs)
    same = exact_gradients((q, k, v), heads, grad_out, grad_maps, q.dtype, **kwargs)
    for a, s, e, x in zip(actual, same, exact, (q, k, v), strict=True):
        assert a.dtype == x.dtype
        assert a.shape == x.shape
        if e.any():
            assert_close(a, s, e, x.dtype)
        else:
            assert not a.any()


@pytest.mark.parametrize("use", ["both", "out", "maps"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_and_dtypes(where, use: str, shared: bool, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(2, 37, 19, 4, 8, shared=shared, dtype=dtype, device=where["device"])
    check_backward(where, q, k, v, 4, use)


@pytest.mark.parametrize("shape", [(1, 1, 2, 1, 1), (3, 5, 7, 3, 20), (2, 65, 150, 8, 40), (1, 33, 300, 2, 80)])
def test_shapes(where, shape: tuple[int, ...]) -> None:
    check_backward(where, *make_qkv(*shape, device=where["device"]), shape[3])


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("average_heads", [True, False])
def test_categories_and_heads(where, reduce: str, average_heads: bool) -> None:
    q, k, v = make_qkv(2, 37, 9, 4, 8, device=where["device"])
    ids = torch.tensor([0, 0, 1, 2, 2, 2, -1, 4, 4], device=where["device"])
    kwargs = {"categories": ids, "num_categories": 6, "reduce": reduce, "average_heads": average_heads}
    check_backward(where, q, k, v, 4, weight=0.3, scale=-0.4, **kwargs)


def test_strided_gradients(where) -> None:
    q, k, v = make_qkv(2, 37, 9, 4, 8, device=where["device"])
    grad_out = torch.randn(2, 32, 37, device=where["device"])
    grad_maps = torch.randn(2, 9, 37, device=where["device"])
    run = ops.cross_attention_maps_backward
    strided = run(grad_out.transpose(1, 2), grad_maps.transpose(1, 2), q, k, v, 4, impl=where["impl"])
    tidy = (x.transpose(1, 2).contiguous() for x in (grad_out, grad_maps))
    # Libraries of matrix products choose their loops by the strides; kernels do not. Two orders of the same sums (37
    # queries, 9 tokens, 8 channels) differ by 2 * 54 roundings of 2^-24, 6e-6 of the terms.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if where["impl"] == "reference" else {"rtol": 0, "atol": 0}
    for a, b in zip(strided, run(*tidy, q, k, v, 4, impl=where["impl"]), strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    expanded = torch.ones(1, 1, 1, device=where["device"]).expand(2, 37, 32)
    same = run(expanded, None, q, k, v, 4, impl=where["impl"])
    for a, b in zip(same, run(torch.ones_like(q), None, q, k, v, 4, impl=where["impl"]), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("expanded", ["k", "v", "k and v"])
def test_expanded_contexts_have_a_gradient_for_each_image(where, expanded: str) -> None:
    """Equal contexts in one place of memory are not a shared context: their gradients are not summed."""
    q, k, v = make_qkv(3, 37, 9, 4, 8, device=where["device"])
    if "k" in expanded:
        k = k[:1].expand(3, -1, -1)
    if "v" in expanded:
        v = v[:1].expand(3, -1, -1)
    check_backward(where, q, k, v, 4)


def test_second_derivatives_are_an_error() -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(2, 5, 3, 4, 8))
    out, _ = ops.cross_attention_maps(q, k, v, 4)
    (gradient,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    with pytest.raises(InputError, match="no second derivatives"):
        gradient.square().sum().backward()


def test_gradients_nobody_wants_are_not_computed(monkeypatch) -> None:
    q, k, v = make_qkv(2, 5, 3, 4, 8)
    addend = torch.zeros(2, 5, 3, requires_grad=True)
    _, maps = ops.cross_attention_maps(q, k, v, 4, addend=addend, map_grad=True)
    monkeypatch.setattr(torch.ops.vpd_fast, "cross_attention_maps_backward", None)
    maps.sum().backward()
    assert torch.equal(addend.grad, torch.ones_like(addend))


def test_two_runs_are_equal_bit_for_bit(where) -> None:
    q, k, v = make_qkv(3, 100, 40, 4, 20, shared=True, device=where["device"])
    grads = torch.randn_like(q), torch.randn(3, 100, 40, device=where["device"])
    first, second = (ops.cross_attention_maps_backward(*grads, q, k, v, 4, impl=where["impl"]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_threads_do_not_change_the_result() -> None:
    q, k, v = make_qkv(3, 100, 40, 4, 20)
    grads = torch.randn_like(q), torch.randn(3, 100, 40)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.cross_attention_maps_backward(*grads, q, k, v, 4, impl="cpu"))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_empty_batch() -> None:
    q, k, v = make_qkv(2, 5, 3, 4, 8, shared=True)
    dq, dk, dv = ops.cross_attention_maps_backward(q[:0], None, q[:0], k, v, 4)
    assert dq.shape == (0, 5, 32)
    assert not dk.any()
    assert not dv.any()


def test_bad_values_are_named() -> None:
    q, k, v = make_qkv(2, 37, 19, 4, 8)
    maps = torch.zeros(2, 37, 19)
    bad = [
        (dict(grad_out=None, grad_maps=None), "grad_out and grad_maps are both None"),
        (dict(grad_out=q[:1]), "grad_out must have shape \\(B=2, N=37, heads\\*D=32\\)"),
        (dict(grad_out=q.bfloat16()), "grad_out must be torch.float32, got torch.bfloat16"),
        (dict(grad_out=q.to("meta")), "grad_out must be on cpu as q is"),
        (dict(grad_maps=maps[:, :, :3]), "grad_maps must have shape \\(B=2, N=37, maps=19\\)"),
        (dict(grad_maps=maps, average_heads=False), "grad_maps must have shape \\(B, heads, N, maps\\)|heads=4"),
        (dict(heads=3), "heads=3 must divide"),
        (dict(impl="fast"), "impl must be 'auto' or an implementation of cross_attention_maps_backward"),
    ]
    for changes, message in bad:
        arguments = {"grad_out": q, "grad_maps": None, "q": q, "k": k, "v": v, "heads": 4} | changes
        with pytest.raises(InputError, match=message):
            ops.cross_attention_maps_backward(**arguments)


@pytest.mark.parametrize("shared", [False, True])
def test_opcheck(shared: bool) -> None:
    op = ops.registry()["cross_attention_maps_backward"]
    q, k, v = make_qkv(2, 11, 7, 2, 4, shared=shared)
    for grads in ((q, None), (None, torch.ones(2, 11, 7)), (q, torch.ones(2, 11, 7))):
        call = op.bind(*grads, q, k, v, 2)
        torch.library.opcheck(torch.ops.vpd_fast.cross_attention_maps_backward.default, (*op.flatten(call), "auto"))


def test_torch_compile() -> None:
    q, k, v = make_qkv(2, 11, 7, 2, 4)

    def run(grad, q, k, v):
        return [x * 2 for x in ops.cross_attention_maps_backward(grad.cos(), None, q, k, v, 2)]

    for a, b in zip(torch.compile(run, fullgraph=True)(q, q, k, v), run(q, q, k, v), strict=True):
        torch.testing.assert_close(a, b)
