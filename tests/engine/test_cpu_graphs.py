"""Graphs of stages on a CPU: what is replayed are the bits of the stage itself, whatever operations it has."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vpd_fast
from vpd_fast.engine import cpu_graphs
from vpd_fast.engine.cpu_graphs import CpuGraphCache

from .test_optimize import conditioned, result, shared_model


class Counted:
    """A stage, and how often it ran."""

    def __init__(self, function: Callable[..., list[Tensor]]) -> None:
        self._function, self.count = function, 0

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        self.count += 1
        return self._function(*inputs)


def many_operations(x: Tensor, y: Tensor) -> list[Tensor]:
    """Views, results in new memory, in given memory and in place, lists, several results, and a constant."""
    parts = torch.cat([x, y.T.float()]).chunk(2)
    variance, mean = torch.var_mean(parts[0], dim=0)
    out = torch.empty_like(x)
    torch.addcmul(mean, x, variance, out=out)
    torch._foreach_mul_([out, parts[1]], 2.0)  # in memory of the concatenation
    ordered = (out + parts[1]).sort(dim=1)
    ones = x.new_zeros(3).add_(1)
    return [ordered.values, ordered.indices, x.relu()[:, ::2].contiguous(), ones, y]


def arguments(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, generator=generator), torch.randn(4, 3, generator=generator).bfloat16()


def equal(results: list[Tensor], expected: list[Tensor]) -> bool:
    pairs = zip(results, expected, strict=True)
    return all(torch.equal(x, y) and x.stride() == y.stride() and x.dtype == y.dtype for x, y in pairs)


def test_a_stage_is_captured_when_its_shapes_come_again() -> None:
    cache, stage = CpuGraphCache(), Counted(many_operations)
    for seed, count in enumerate((1, 2, 2, 2)):
        inputs = arguments(seed)
        assert equal(cache.run("stage", stage, *inputs), many_operations(*inputs))
        assert stage.count == count


def test_what_a_stage_depends_on_is_part_of_the_key(monkeypatch) -> None:
    cache, texts = CpuGraphCache(), [torch.randn(3), torch.randn(3)]
    for text in texts * 3:
        x = torch.randn(3)
        assert torch.equal(cache.run("add", lambda x, t=text: [x + t], x, state=text)[0], x + text)
    stage, x = Counted(lambda x: [2 * x]), torch.randn(3)
    threads = torch.get_num_threads()
    for count in (threads, threads, threads, threads + 1):  # kernels are told how many
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        cache.run("double", stage, x)
    assert stage.count == 3


@pytest.mark.parametrize(
    "depends", [lambda x: x.sum() > 0, lambda x: torch.equal(x, x.abs()), lambda x: x[0].item() > 0]
)
def test_a_stage_that_depends_on_numbers_only_runs(depends: Callable[[Tensor], bool]) -> None:
    cache, stage = CpuGraphCache(), Counted(lambda x: [2 * x] if depends(x) else [x - 1])
    for x in (torch.ones(3), torch.ones(3), -torch.ones(3), torch.ones(3)):
        assert torch.equal(cache.run("stage", stage, x)[0], 2 * x if x[0] > 0 else x - 1)
    assert stage.count == 5  # and once in vain


def test_a_stage_of_much_memory_only_runs(monkeypatch) -> None:
    monkeypatch.setattr(cpu_graphs, "MAX_BYTES", 1000)
    cache = CpuGraphCache()
    for size, count in ((62, 2), (63, 5)):  # four results of so many times four bytes; the larger are tried in vain
        stage = Counted(lambda x: [x + 1 + 2 + 3 + 4])
        for _ in range(4):
            x = torch.randn(size)
            assert torch.equal(cache.run("stage", stage, x)[0], x + 1 + 2 + 3 + 4)
        assert stage.count == count


def test_the_least_recently_used_goes() -> None:
    cache, stage = CpuGraphCache(max_graphs=2), Counted(lambda x: [2 * x])
    for size in (1, 1, 2, 2, 1, 3, 1, 2):  # 3 drops 2
        cache.run("double", stage, torch.randn(size))
    assert stage.count == 6


def test_results_outlive_later_calls_and_may_be_changed() -> None:
    cache, x = CpuGraphCache(), torch.randn(3)
    with torch.inference_mode():
        for _ in range(2):
            cache.run("stage", lambda x: [2 * x], x)
    (first,) = cache.run("stage", lambda x: [2 * x], x)
    (second,) = cache.run("stage", lambda x: [2 * x], x + 1)
    assert torch.equal(first, 2 * x)
    assert torch.equal(second.add_(1), 2 * (x + 1) + 1)
    assert torch.equal(cache.run("stage", lambda x: [2 * x], x)[0], first)


def test_an_error_of_the_stage_is_raised() -> None:
    cache, stage = CpuGraphCache(), Counted(lambda x: [x @ x])
    for _ in range(3):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            cache.run("product", stage, torch.randn(2, 3))
    assert stage.count == 3


def test_threads_have_graphs_of_their_own() -> None:
    cache, barrier = CpuGraphCache(), threading.Barrier(4)
    wrong: list[int] = []

    def work(seed: int) -> None:
        barrier.wait()
        for i in range(50):
            inputs = arguments(4 * i + seed)
            if not equal(cache.run("stage", many_operations, *inputs), many_operations(*inputs)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Seen(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_who_watches_operations_sees_them() -> None:
    cache, x = CpuGraphCache(), torch.randn(3)
    for _ in range(3):
        cache.run("stage", lambda x: [2 * x], x)
    with Seen() as seen:
        cache.run("stage", lambda x: [2 * x], x)
    assert seen.count == 1
    with torch.autocast("cpu", torch.bfloat16):
        (result,) = cache.run("product", lambda x: [x[None] @ x[:, None]], x)
    assert result.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("task", "precision"),
    [("segmentation", "int8"), ("segmentation", "bf16"), ("referring", "fp32"), ("depth", "int8")],
)
def test_models_compute_the_same_bits(task: str, precision: str) -> None:
    fast, results = vpd_fast.optimize(shared_model(task), precision), []
    images = [torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in range(4)]
    for graphs in (False, True):
        fast.graphs = graphs
        results.append([result(fast, conditioned(fast, x)) for x in images])
    captured = [idle for idle, _ in fast._graphs._graphs.values() if idle]
    assert len(captured) == 3
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
