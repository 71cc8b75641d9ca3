"""Attention by shape: every implementation, and every kernel that scaled_dot_product_attention has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import product
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from measuring.plan import Row, Step
from measuring.setting import Setting
from vpd_fast import ops
from vpd_fast.bench.attention import sdpa, sdpa_and_maps
from vpd_fast.bench.suites import NOT_FOR_GPUS
from vpd_fast.kernels import _attention_cuda

LEVELS = ((4096, 8, 40), (1024, 8, 80), (256, 8, 160))  # positions, heads, head dimension
SELF = (*LEVELS, (64, 8, 160), (4096, 1, 512))  # the last in the KL encoder
TOKENS = (40, 77, 150)
ORDERS = ("sequential", "overlapped", "polynomial")  # of the kernel with wgmma; the last for narrow heads
LIBRARY = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
TINY = (16, 2, 8)


def steps(setting: Setting) -> Iterator[Step]:
    """A step for each shape; those of high throughput first."""
    for batch in (1,) if setting.dry else (8, 1):
        for shape in setting.only(list(SELF)):
            run = functools.partial(_self_attention, setting, batch, TINY if setting.dry else shape)
            yield Step(f"self {batch}x{'x'.join(map(str, shape))}", run)
        for shape, tokens in setting.only(list(product(LEVELS, TOKENS))):
            run = functools.partial(_cross_attention, setting, batch, TINY if setting.dry else shape, tokens)
            yield Step(f"cross {batch}x{'x'.join(map(str, shape))}, {tokens} tokens", run)


def _implementations(name: str) -> list[str]:
    return [i.name for i in ops.registry()[name].implementations if i.name not in NOT_FOR_GPUS]


def _rows(setting: Setting, calls: dict[str, Callable], gflop: float, **facts: object) -> list[Row]:
    with torch.inference_mode():
        usable, reasons = setting.possible(calls)
    times = setting.milliseconds(usable)
    rows = [{**facts, "variant": name, "ms": ms, "tflop_per_s": gflop / ms} for name, ms in times.items()]
    return rows + [{**facts, "variant": name, "not run": reason} for name, reason in reasons.items()]


def _self_attention(setting: Setting, batch: int, shape: tuple[int, int, int]) -> list[Row]:
    positions, heads, dim = shape
    qkv = setting.random(batch, positions, 3 * heads * dim, dtype=torch.bfloat16).chunk(3, dim=-1)
    calls = {
        name: lambda name=name: ops.self_attention(*qkv, heads, impl=name)
        for name in _implementations("self_attention")
    }
    kernels = product(ORDERS[: 3 if dim <= 40 else 2], (1, 2, 3) if dim <= 40 else (1, 2))
    calls |= {f"cuda {order} {groups}": _by_kernel(order, groups, *qkv, heads) for order, groups in kernels}
    calls |= {
        f"library {name}": functools.partial(_by_backend, backend, *qkv, heads) for name, backend in LIBRARY.items()
    }
    return _rows(setting, calls, 4e-9 * batch * heads * dim * positions**2, kind="self", batch=batch, shape=str(shape))


def _by_kernel(order: str, groups: int, *args: object) -> Callable[[], torch.Tensor]:
    """A call of the kernel with wgmma in that order, with so many warpgroups per block."""

    def call() -> torch.Tensor:
        with mock.patch.multiple(_attention_cuda, ORDER=order, GROUPS=groups):
            return ops.self_attention(*args, impl="cuda")

    return call


def _maps_by_kernel(schedule: str, warpgroups: int, *args: object) -> Callable[[], object]:
    """A call of the kernel with wgmma and maps whose blocks share heads like this, with so many warpgroups each."""

    def call() -> object:
        with (
            mock.patch.object(_attention_cuda, "WARPGROUPS", warpgroups),
            mock.patch("vpd_fast.ops._attention.CUDA_SCHEDULE", schedule),
        ):
            return ops.cross_attention_maps(*args, impl="wgmma")

    return call


def _by_backend(backend: SDPBackend, *args: object) -> torch.Tensor:
    with sdpa_kernel(backend):
        return sdpa(*args)


def _cross_attention(setting: Setting, batch: int, shape: tuple[int, int, int], tokens: int) -> list[Row]:
    positions, heads, dim = shape
    q = setting.random(batch, positions, heads * dim, dtype=torch.bfloat16)
    k, v = setting.random(batch, tokens, 2 * heads * dim, dtype=torch.bfloat16).chunk(2, dim=-1)
    operator = "cross_attention_maps"
    calls = {
        name: lambda name=name: ops.cross_attention_maps(q, k, v, heads, impl=name)
        for name in _implementations(operator)
    }
    calls |= {
        f"{name} without maps": lambda name=name: ops.cross_attention_maps(q, k, v, heads, need_maps=False, impl=name)
        for name in _implementations(operator)
    }
    kernels = product(("heads_loop", "cluster"), (2,) if dim > 80 and tokens > 80 else (1, 2))
    calls |= {f"wgmma {how} {groups}": _maps_by_kernel(how, groups, q, k, v, heads) for how, groups in kernels}
    calls |= {"library": lambda: sdpa(q, k, v, heads), "library and maps": lambda: sdpa_and_maps(q, k, v, heads)}
    gflop = 4e-9 * batch * heads * dim * positions * tokens
    return _rows(setting, calls, gflop, kind="cross", batch=batch, shape=str(shape), tokens=tokens)
