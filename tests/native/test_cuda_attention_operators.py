"""`cross_attention_maps` by impl="wgmma", with and without maps, and `self_attention` by "cuda", over the emulation."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest
import torch

from vpd_fast import _native, ops
from vpd_fast.errors import InputError
from vpd_fast.ops._dispatch import Op

from ..ops.attention_cases import assert_close, eager, make_qkv
from .devices import H200

DTYPES = (torch.bfloat16, torch.float16)
ONE_BLOCK = 128  # tokens that are one block of keys in both kernels, whose sums then have the same order


@pytest.fixture(autouse=True)
def emulated(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The operators take CPU tensors for the emulated device's."""
    cuda.configure(*H200)
    cuda.announce([(0, 2**63, True)])
    named = lambda self, impl, args: next(i for i in self.implementations if i.name == impl)  # noqa: E731
    monkeypatch.setattr(Op, "choose", named)
    monkeypatch.setattr(_native, "load", lambda name: {"_C_cuda": cuda}[name])
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    return cuda


def check(cuda: ModuleType, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> None:
    """Holds cross-attention to float64, and self-attention's kernel to the same bits."""
    cuda.launches()
    out, maps = ops.cross_attention_maps(q, k, v, 2, scale, need_maps=False, impl="wgmma")
    assert cuda.launches() == 1
    assert maps is None
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    exact, same = (eager(*(x.to(dtype) for x in (q, k, v)), 2, scale)[0] for dtype in (torch.float64, q.dtype))
    assert_close(out, same, exact, q.dtype, computed_on_gpu=True)
    assert torch.equal(ops.self_attention(q, k, v, 2, scale, impl="cuda"), out)
    with_maps, maps = ops.cross_attention_maps(q, k, v, 2, scale, impl="wgmma")
    exact, same = (eager(*(x.to(dtype) for x in (q, k, v)), 2, scale)[1] for dtype in (torch.float64, torch.float32))
    assert_close(maps, same, exact, torch.float32, computed_on_gpu=True)
    if k.shape[1] <= ONE_BLOCK:
        assert torch.equal(with_maps, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "dim"), [(1, 8), (40, 40), (150, 40), (77, 80)])
def test_cross_attention(emulated: ModuleType, tokens: int, dim: int, dtype: torch.dtype) -> None:
    check(emulated, *make_qkv(2, 21, tokens, 2, dim, dtype=dtype))


def test_a_context_that_all_images_share(emulated: ModuleType) -> None:
    q, k, v = make_qkv(3, 21, 19, 2, 8, shared=True, dtype=torch.bfloat16)
    check(emulated, q, k, v, 0.5)
    check(emulated, q, k.expand(3, -1, -1), v.expand(3, -1, -1).contiguous())  # one is shared in memory


def test_strides(emulated: ModuleType) -> None:
    """Keys and values that are halves of one tensor, rows that TMA cannot read, channels that are not neighbours."""
    q, k, v = make_qkv(2, 21, 19, 2, 8, dtype=torch.bfloat16)
    check(emulated, q, *torch.cat((k, v), -1).chunk(2, -1))
    wide = torch.zeros(2, 21, 20, dtype=q.dtype)
    wide[..., 3:19] = q
    check(emulated, wide[..., 3:19], k, v)
    check(emulated, q, k.mT.contiguous().mT, v)


def test_what_the_kernel_refuses_is_an_error() -> None:
    q, k, v = make_qkv(1, 5, 7, 2, 168, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="cannot compute this attention: there are more than 160 elements"):
        ops.cross_attention_maps(q, k, v, 2, need_maps=False, impl="wgmma")


def test_forms_of_maps(emulated: ModuleType) -> None:
    """Categories, a sum over layers, a slice of features of 16 bits, each head alone."""
    q, k, v = make_qkv(2, 20, 19, 2, 8, dtype=torch.bfloat16)
    wide = [x.double() for x in (q, k, v)]
    ids = torch.tensor([i % 5 - 1 for i in range(19)])
    options = {"categories": ids, "num_categories": 5, "reduce": "sum", "weight": 0.25}
    addend = torch.randn(2, 20, 5)
    _, maps = ops.cross_attention_maps(q, k, v, 2, **options, addend=addend, impl="wgmma")
    exact, same = (eager(*x, 2, **options, addend=addend)[1] for x in (wide, [x.float() for x in wide]))
    assert_close(maps, same, exact, torch.float32, computed_on_gpu=True)
    features = torch.zeros(2, 9, 4, 5, dtype=torch.bfloat16)
    out = ops.cross_attention_maps_into(q, k, v, features[:, 3:8], 2, **options, addend=addend, impl="wgmma")
    assert torch.equal(out, ops.cross_attention_maps(q, k, v, 2, impl="wgmma")[0])
    assert torch.equal(features[:, 3:8], maps.mT.unflatten(2, (4, 5)).to(torch.bfloat16))
    assert not features[:, :3].any()
    assert not features[:, 8:].any()
    _, maps = ops.cross_attention_maps(q, k, v, 2, average_heads=False, impl="wgmma")
    exact, same = (eager(*x, 2, average_heads=False)[1] for x in (wide, [x.float() for x in wide]))
    assert_close(maps, same, exact, torch.float32, computed_on_gpu=True)


def test_what_the_kernel_with_maps_refuses_is_an_error() -> None:
    q, k, v = make_qkv(1, 5, 161, 2, 8, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="cannot compute this attention: there are more than 160 tokens"):
        ops.cross_attention_maps(q, k, v, 2, impl="wgmma")
