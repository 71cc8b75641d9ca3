"""`cross_attention_maps` without maps by impl="wgmma", and `self_attention` by "cuda": the emulated kernel computes."""

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
