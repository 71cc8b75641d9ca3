"""A pass with labels launches what a pass without them does, so that what is timed is what users run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vpd_fast import VPDConfig, ops
from vpd_fast.bench import operations
from vpd_fast.bench.engine_pass import Label, labelled
from vpd_fast.bench.variants import conditioning
from vpd_fast.engine.model import FastVPD

IMAGES = torch.empty(2, 3, 64, 64, device="meta")
RESIDUAL_BLOCKS = 6 + 14  # of the encoder and the UNet


class Launches(TorchDispatchMode):
    """Every operator that computes or copies, with its arguments; of tensors what does not differ between passes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
        if operations._moves_bytes(func):
            self.calls.append((str(func), {name: _described(value) for name, value in given.items()}))
        return func(*args, **(kwargs or {}))


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.stride(), value.storage_offset()
    return [_described(x) for x in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def recorded() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    with torch.no_grad(), operations.ValuesAreFine(), Launches() as launches:
        yield launches.calls


@pytest.fixture
def engine(tiny_backbone) -> Callable[..., FastVPD]:
    """A fast model of tensors without memory, which launches what one for that kind of device does."""

    def make(precision: str, kind: str, task: str = "segmentation") -> FastVPD:
        config = VPDConfig(task=task, base_size=64, channels=32, backbone=tiny_backbone)
        return operations.empty_engine(config, precision, kind)

    return make


def plain_pass(model: FastVPD, known: tuple) -> None:
    """What a user of the model calls. known: text or scene."""
    task = model.config.task
    latents = model.encode(IMAGES)
    result = model.decode(model.features(latents, model.context(*known)))
    if task != "depth":
        ops.upsample_argmax(result, IMAGES.shape[2:], align_corners=task == "referring")


@pytest.mark.parametrize(("precision", "kind", "task"), [
    *(("int8", "cuda", task) for task in ("segmentation", "referring", "depth")),
    *((precision, "cuda", "segmentation") for precision in ("fp8", "fp32")), ("int8", "cpu", "segmentation"),
    pytest.param("bf16", "cuda", "segmentation", marks=pytest.mark.slow),
])  # fmt: skip
def test_labels_change_nothing(engine: Callable, precision: str, kind: str, task: str) -> None:
    model, labels = engine(precision, kind, task), []
    known = (None, len(IMAGES)) if task == "depth" else conditioning(model.config, len(IMAGES), "meta")
    with recorded():
        plain_pass(model, known)  # makes what is kept from pass to pass
    with recorded() as expected:
        plain_pass(model, known)

    def around(label: Label, call: Callable[[], Any]) -> Any:
        labels.append(label)
        return call()

    with labelled(model) as run:
        run.prepare(len(IMAGES))
        assert all(isinstance(layer, type(model.layers[name])) for name, layer in model.layers.items())
        for options in ({}, {"around": around}):
            with recorded() as launched:
                run(IMAGES, **options)
            assert launched == expected
    ours = [name for name, _ in expected if name.startswith("vpd_fast")]
    assert len(labels) == len(ours) > 100
    # Where kernels find ranges of their results, norms tell those of their input, and convolutions need no pass for it.
    told = [given["ranges"] for name, given in expected if name.startswith("vpd_fast.conv2d")]
    eight_bits = kind == "cuda" and precision in ("int8", "fp8")
    assert sum(ranges is not None for ranges in told) == (RESIDUAL_BLOCKS * 2 if eight_bits else 0)


def test_layers_are_their_own_again(engine: Callable) -> None:
    model = engine("int8", "cuda")
    before, functions = dict(model.layers), ops.self_attention
    with labelled(model):
        assert all(model.layers[name] is not layer for name, layer in before.items())
    assert all(model.layers[name] is layer for name, layer in before.items())
    assert ops.self_attention is functions
