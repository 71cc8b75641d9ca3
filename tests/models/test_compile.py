"""torch.compile takes a plain model whole: no graph breaks, and none is compiled again for images of a known size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from vpd_fast import VPD, VPDConfig
from vpd_fast.models.attention import CrossAttention
from vpd_fast.models.random_weights import randomize

TASKS = ("segmentation", "referring", "depth")


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    """Nothing is compiled before, and nothing of it is left."""
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=False):
        yield
    torch.compiler.reset()


@pytest.fixture
def make(small_backbone) -> Callable[..., VPD]:
    """A model with all kinds of blocks and levels, one of each, because they take the compiler's time."""

    def make(task: str, backend: str = "sdpa", **fields: object) -> VPD:
        backbone = dataclasses.replace(
            small_backbone, num_res_blocks=1, attention_resolutions=(2,), vae_num_res_blocks=1
        )
        sizes = {"num_classes": 3, "tokens": 5, "num_scenes": 4, "channels": 32, "base_size": 128, "use_attn": True}
        model = randomize(VPD.empty(VPDConfig(task=task, backbone=backbone, **{**sizes, **fields})), 0).eval()
        model.attention_backend = backend
        return model

    return make


def inputs(task: str, batch: int = 1) -> tuple[Tensor, ...]:
    """Images, and a sentence or a scene each."""
    images = torch.rand(batch, 3, 64, 64)
    if task == "depth":
        return images, torch.arange(batch)
    return (images * 2 - 1, *([torch.randn(batch, 5, 64)] if task == "referring" else []))


def result(model: Callable, *given: Tensor) -> Tensor:
    found = model(*given)
    return found["pred_d"] if isinstance(found, dict) else found


# The compiler takes seconds of CPU time for each network, and all tasks have the same encoder and UNet.
QUICK = ("segmentation", "sdpa")
OTHERS = [(task, backend) for task in TASKS for backend in ("sdpa", "plain") if (task, backend) != QUICK]


@pytest.mark.parametrize(
    ("task", "backend"), [QUICK, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)]
)
@torch.no_grad()
def test_one_graph_and_no_other_for_images_of_the_same_size(make: Callable, task: str, backend: str) -> None:
    model = make(task, backend)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for again in (False, True):
        torch._dynamo.config.error_on_recompile = again
        given = inputs(task)
        assert torch.equal(result(compiled, *given), result(model, *given))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("task", ["referring", pytest.param("depth", marks=pytest.mark.slow)])
@torch.no_grad()
def test_text_and_head_of_the_other_tasks(make: Callable, task: str) -> None:
    """With any number of images after the second."""
    model, sides = make(task), (8, 4, 2, 1)

    def around_the_unet(known: Tensor, *features: Tensor) -> tuple[Tensor, Tensor]:
        return model.context(known), model.decode(list(features), (64, 64))

    compiled = torch.compile(around_the_unet, fullgraph=True, backend="eager")
    graphs = []
    for batch in (2, 3, 4, 2):
        shapes = zip(model.config.feature_channels, sides, strict=True)
        given = inputs(task, batch)[1], *(torch.randn(batch, c, side, side) for c, side in shapes)
        for a, b in zip(compiled(*given), around_the_unet(*given), strict=True):
            assert torch.equal(a, b)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 2, 2]


@pytest.mark.parametrize("part", ["attention", pytest.param("unet", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_batch_of_another_size_is_compiled_once_for_all_sizes(make: Callable, part: str) -> None:
    """The UNet's attention looks at the sizes; what else there is is PyTorch's own."""
    model = make("segmentation")
    layer = next(m for m in model.modules() if isinstance(m, CrossAttention))
    width = layer.to_q.in_features

    def attend(x: Tensor, context: Tensor) -> list[Tensor]:
        return list(layer(x, context, map_sum=(1.0, None)))

    function = attend if part == "attention" else model.features
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    graphs = []
    for batch in (2, 3, 4, 2):
        if part == "attention":
            given = torch.randn(batch, 16, width), torch.randn(batch, 3, layer.to_k.in_features)
        else:
            given = torch.randn(batch, 4, 8, 8), model.context(batch)
        for a, b in zip(compiled(*given), function(*given), strict=True):
            assert torch.equal(a, b)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 2, 2]  # for 2; for any batch


@torch.no_grad()
def test_the_range_of_scenes_is_asserted_by_the_graph(make: Callable) -> None:
    model = make("depth")
    compiled = torch.compile(model.context, fullgraph=True, backend="eager")
    scenes = torch.tensor([0, 3])
    assert torch.equal(compiled(scenes), model.context(scenes))
    for wrong in (-1, 4):
        with pytest.raises(RuntimeError, match=r"class_ids must be in \[0, 4\)"):
            compiled(torch.tensor([0, wrong]))


@torch.no_grad()
def test_autocast_is_no_question_to_the_compiler(make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a kind of device knows it: a question that ends a graph. With autocast there is another graph."""
    monkeypatch.delattr(torch.amp, "is_autocast_available")
    layer = next(m for m in make("segmentation").modules() if isinstance(m, CrossAttention))
    tokens = torch.randn(1, 16, layer.to_q.in_features)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    exact = compiled(tokens, tokens, map_sum=(1.0, None))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = compiled(tokens, tokens, map_sum=(1.0, None))
        expected = layer(tokens, tokens, map_sum=(1.0, None))
    assert counters["stats"]["unique_graphs"] == 2
    for a, b, c in zip(rounded, expected, exact, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
