"""The cache of CUDA graphs, with a capture that records instead of capturing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vpd_fast.engine.graphs import GraphCache, copy_all


class Recorded:
    """Replays by running the stage again."""

    captured: list[tuple] = []

    def __init__(self, stage, inputs: tuple[Tensor, ...]) -> None:
        self._stage = stage
        Recorded.captured.append(tuple(x.shape for x in inputs))

    def __call__(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        return [x.clone() for x in self._stage(*inputs)]


@pytest.fixture
def cache(monkeypatch) -> GraphCache:
    Recorded.captured = []
    monkeypatch.setattr(GraphCache, "wanted", staticmethod(lambda x: True))
    return GraphCache(Recorded, max_graphs=2)


def double(x: Tensor) -> list[Tensor]:
    return [2 * x]


def test_tensors_are_copied_whatever_their_layouts_and_types() -> None:
    tensors = torch.randn(2, 3), torch.randn(3, 2).T, torch.randn(4).bfloat16(), torch.randn(2, 3, 4, 5)
    copies = [torch.empty_like(x) for x in tensors]
    copies[3] = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    copy_all(copies, tensors)
    assert all(torch.equal(x, copy) for x, copy in zip(tensors, copies, strict=True))
    assert copies[3].is_contiguous(memory_format=torch.channels_last)


def test_a_shape_is_captured_once(cache: GraphCache) -> None:
    for size in (3, 3, 4, 3, 4):
        x = torch.randn(size)
        assert torch.equal(cache.run("double", double, x)[0], 2 * x)
    assert Recorded.captured == [((3,),), ((4,),)]


def test_each_layout_is_captured(cache: GraphCache) -> None:
    for x in (torch.randn(3, 4), torch.randn(4, 3).T):
        assert torch.equal(cache.run("double", double, x)[0], 2 * x)
    assert len(Recorded.captured) == 2


def test_the_least_recently_used_goes(cache: GraphCache) -> None:
    for size in (1, 2, 1, 3, 1, 2):  # 3 drops 2, and 2 drops 3
        cache.run("double", double, torch.randn(size))
    assert Recorded.captured == [((1,),), ((2,),), ((3,),), ((2,),)]


def test_what_a_stage_depends_on_is_part_of_the_key(cache: GraphCache) -> None:
    texts = [torch.randn(3), torch.randn(3)]
    for text in (*texts, *texts):
        x = torch.randn(3)
        assert torch.equal(cache.run("add", lambda x, t=text: [x + t], x, state=text)[0], x + text)
    assert len(Recorded.captured) == 2


def test_what_cannot_be_captured_runs_with_one_warning(monkeypatch) -> None:
    def refuse(stage, inputs):
        raise torch.OutOfMemoryError("no memory for a graph")

    monkeypatch.setattr(GraphCache, "wanted", staticmethod(lambda x: True))
    cache, x = GraphCache(refuse), torch.randn(3)
    with pytest.warns(UserWarning, match="double runs without a CUDA graph.*no memory"):
        assert torch.equal(cache.run("double", double, x)[0], 2 * x)
    assert torch.equal(cache.run("double", double, x)[0], 2 * x)  # a second warning would be an error


def test_an_error_of_the_stage_leaves_the_cache_as_it_was(cache: GraphCache) -> None:
    def fails(x: Tensor) -> list[Tensor]:
        raise ValueError("not today")

    with pytest.raises(ValueError, match="not today"):
        cache.run("fails", fails, torch.randn(3))
    cache.run("double", double, torch.randn(3))
    assert len(cache._graphs) == 2


def test_without_a_gpu_stages_simply_run() -> None:
    cache = GraphCache(Recorded)
    Recorded.captured = []
    assert torch.equal(cache.run("double", double, torch.ones(2))[0], torch.full((2,), 2.0))
    cache.enabled = False
    cache.run("double", double, torch.ones(2))
    assert not Recorded.captured
