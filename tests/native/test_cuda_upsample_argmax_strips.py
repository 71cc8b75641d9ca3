"""`upsample_argmax` by strips of pixels, emulated: labels are the reference's, also of ties and special numbers."""

from __future__ import annotations

import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vpd_fast.ops._dispatch import registry

from .cuda_gemm_cases import memory_of
from .devices import H200

module = importlib.import_module("vpd_fast.ops.upsample_argmax")  # whose name is that of the function, too


@pytest.fixture
def strips(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`strips(name, *arguments)` -> labels of the emulated kernel and of the reference."""
    cuda.configure(*H200)
    monkeypatch.setattr(module._native, "load", lambda name: {"_C_cuda": cuda}[name])
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))

    def run(logits: Tensor, *args: Any, name: str = "upsample_argmax", **options: Any) -> tuple[Tensor, Tensor]:
        call = registry()[name].bind(logits, *args, **options)
        rows, columns = call.problem.rows, call.problem.columns
        tables = [*module._on_device(rows, 2, logits.device), *module._on_device(columns, 2, logits.device)]
        labels = torch.full(call.problem.empty_labels().shape, -7)
        monkeypatch.setattr(module.Problem, "empty_labels", lambda self: labels)
        read = (logits, *tables, module._strips(columns, logits.device))
        cuda.announce([*((*memory_of(x), False) for x in read), (*memory_of(labels), True)])
        return module._cuda(call, strips=True), module._reference(call)

    return run


def whole(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Whole numbers, whose sums with weights of sixteenths are exact, so that there are many ties."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 3, 6, 8, 9])
def test_labels_are_those_of_the_reference(strips: Any, channels: int, dtype: torch.dtype) -> None:
    """Channels next to each other, one, two or four of them loaded together, and channels apart."""
    logits = whole(2, channels, 5, 6, dtype=dtype)
    for x in (logits, channels_last(logits)):
        labels, expected = strips(x, (40, 48))
        assert torch.equal(labels, expected)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(5, 6), (7, 23), (3, 2), (61, 1), (20, 120)])
def test_other_sizes(strips: Any, size: tuple[int, int], align_corners: bool) -> None:
    """Strips of one pixel, and cells of more pixels than a strip has; what is rounded makes no ties here."""
    logits = torch.randn(1, 5, 5, 6, generator=torch.Generator().manual_seed(1))
    labels, expected = strips(channels_last(logits), size, align_corners=align_corners)
    assert torch.equal(labels, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38])
@pytest.mark.parametrize("last", [False, True])
def test_special_numbers(strips: Any, value: float, last: bool) -> None:
    """The first NaN wins over everything, also that of two infinities; of equal numbers the first."""
    logits = whole(1, 6, 4, 5)
    logits[0, 4, 1, 2], logits[0, 2, 1, 3], logits[0, 5, 2, 2], logits[0, 1, 3, 0] = value, value, -value, value
    logits[0, :, 0, 0] = value
    labels, expected = strips(channels_last(logits) if last else logits, (32, 40))
    assert torch.equal(labels, expected)


def test_equal_channels(strips: Any) -> None:
    logits = torch.randn(1, 1, 4, 5, generator=torch.Generator().manual_seed(2)).expand(1, 7, 4, 5)
    labels, _ = strips(logits, (29, 31))
    assert not labels.any()


def test_windows_that_do_not_overlap(strips: Any) -> None:
    logits = whole(2, 4, 5, 4, 4)
    sizes = {"crop_size": (32, 32), "image_size": (64, 64)}
    labels, expected = strips(logits, [0, 32], [0, 32], name="upsample_argmax_windows", **sizes)
    assert torch.equal(labels, expected)


def test_no_images(strips: Any) -> None:
    labels, _ = strips(whole(0, 4, 4, 4), (32, 32))
    assert labels.shape == (0, 32, 32)


@pytest.mark.parametrize(("n_in", "n_out", "longest"), [(4, 32, 8), (4, 128, 8), (5, 8, 2), (8, 4, 1)])
def test_strips(n_in: int, n_out: int, longest: int) -> None:
    """They cover every pixel once and read one pair of columns each."""
    weights = module.resize_weights(n_in, n_out, False)
    begins = module._strips(weights, torch.device("cpu")).tolist()
    sources, _ = weights.padded(2, torch.device("cpu"))
    lengths = [end - begin for begin, end in zip(begins, begins[1:], strict=False)]
    assert (begins[0], begins[-1], max(lengths)) == (0, n_out, longest)
    assert min(lengths) > 0
    for begin, end in zip(begins, begins[1:], strict=False):
        assert (sources[begin:end] == sources[begin]).all()
