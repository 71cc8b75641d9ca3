"""Arguments that cannot be, of the public calls of models and engines: one of the package's errors, or a result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vpd_fast
from vpd_fast import VPD, VPDConfig
from vpd_fast.engine import FastVPD, Policy
from vpd_fast.errors import InputError, VPDFastError
from vpd_fast.models.random_weights import randomize
from vpd_fast.pictures.reading import read_image

from ..helpers.backbones import TINY

SIZES = {"num_classes": 3, "tokens": 5, "num_scenes": 4, "channels": 32, "base_size": 128}
ODD_VALUES = [
    *(-1, 2**70, math.nan, True, "text", "a\0b", b"bytes", object(), [], [1], (1, 2), {"a": 1}, torch.float64),
    *(torch.zeros(3), torch.zeros(2, 3, 64, 64, dtype=torch.int64), torch.zeros(1, 3, 64, 64, device="meta")),
    *(torch.zeros(1, 3, 64, 64).to_sparse(), torch.nested.nested_tensor([torch.zeros(3, 64, 64)])),
    *(torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(3, 3)], layout=torch.jagged), "x" * 10**6),
    *(torch.zeros(1, 3, 64, 64, dtype=torch.complex64).conj(), [torch.zeros(3).to_sparse()] * 4, [torch.zeros(3)] * 4),
]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module", params=["segmentation", "referring", "depth"])
def models(request: pytest.FixtureRequest) -> dict[str, Any]:
    config = VPDConfig(task=request.param, **SIZES, backbone=TINY)  # type: ignore[arg-type]
    model = randomize(VPD.empty(config)).eval()
    return {"plain": model, "fast": vpd_fast.optimize(model)}


def calls(model: Any) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    images, latents = torch.zeros(1, 3, 64, 64), torch.zeros(1, 4, 8, 8)
    context = torch.zeros(1, 3, 64)
    if model.task != "referring":
        yield "forward", model
        yield "extract_feat", model.extract_feat
    if model.task != "segmentation":
        yield "forward, second", lambda odd: model(images, odd)
        yield "extract_feat, second", lambda odd: model.extract_feat(images, odd)
    yield "encode", model.encode
    yield "features", lambda odd: model.features(odd, context)
    yield "features, context", lambda odd: model.features(latents, odd)
    yield "context", model.context
    yield "decode", model.decode
    yield "split_maps", model.split_maps
    yield "predict", model.predict
    if not isinstance(model, FastVPD):
        yield "gradient_checkpointing_enable", model.gradient_checkpointing_enable
        yield "attention_backend", lambda odd: setattr(model, "attention_backend", odd)


@pytest.mark.parametrize("kind", ["plain", "fast"])
def test_calls_of_models(models: dict[str, Any], kind: str) -> None:
    for name, call in calls(models[kind]):
        for value in ODD_VALUES:
            message = ""
            try:
                call(value)
            except VPDFastError as error:
                message = str(error)
            assert len(message) < 600, name


def test_sizes_of_decode(models: dict[str, Any]) -> None:
    model = models["plain"]
    extra = (torch.zeros(1, 5, 64),) if model.task == "referring" else ()
    features = model.extract_feat(torch.zeros(2, 3, 64, 64), *(x.expand(2, -1, -1) for x in extra))
    for size in (5, (0, 4), (4,), ("a", "b"), (4.0, 4.0), "64"):
        with pytest.raises(InputError, match="size must be None or"):
            model.decode(features, size)


def test_negative_views_of_images(models: dict[str, Any]) -> None:
    images = torch.rand(2, 3, 64, 64)
    extra = (torch.zeros(2, 5, 64),) if models["plain"].task == "referring" else ()
    for model in models.values():
        plain, negative = (model(x, *extra) for x in (-images, torch._neg_view(images)))
        plain, negative = (x if isinstance(x, Tensor) else x["pred_d"] for x in (plain, negative))
        assert torch.equal(plain, negative)


@pytest.mark.parametrize("argument", ["model", "precision", "calibration", "policy", "device"])
def test_optimize(models: dict[str, Any], argument: str) -> None:
    for value in ODD_VALUES:
        if argument == "calibration" or value is not True:
            arguments = {"model": models["plain"], "precision": "int8", **({argument: value} if argument else {})}
            with pytest.raises(VPDFastError) as error:
                vpd_fast.optimize(**arguments)
            assert len(str(error.value)) < 600


@pytest.mark.parametrize("precisions", [{1: "int8"}, {"a": 1}, {"a": []}, 5, "int8"])
def test_policies(precisions: Any) -> None:
    with pytest.raises(InputError, match="policy.precisions"):
        Policy(precisions=precisions)


@pytest.mark.parametrize("value", [5, 1.5, b"bytes", None, [], "a\0b", object()])
def test_paths(models: dict[str, Any], tmp_path: Path, value: Any) -> None:
    plain, fast = models["plain"], models["fast"]
    for call in (
        VPD.from_checkpoint, VPD.from_pretrained, lambda path: VPD.from_stable_diffusion(path, plain.config),
        plain.save_pretrained, fast.save, vpd_fast.load_engine,
    ):  # fmt: skip
        with pytest.raises(InputError, match="must be a path"):
            call(value)
    assert not list(tmp_path.iterdir())


def test_too_few_numbers_for_statistics_name_the_setting() -> None:
    narrow = dataclasses.replace(TINY, channel_mult=(1, 1, 1, 1))
    model = randomize(VPD.empty(VPDConfig(**SIZES, backbone=narrow)))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="model_channels=32.*batch_size"):
        model.eval()(torch.zeros(1, 3, 64, 64))
    model(torch.zeros(2, 3, 64, 64))
    model = randomize(VPD.empty(VPDConfig(**SIZES, backbone=TINY)))  # type: ignore[arg-type]
    model.eval()(torch.zeros(1, 3, 64, 64))
    with pytest.raises(InputError, match="batch norms have one number per channel.*batch_size"):
        model.train()(torch.zeros(1, 3, 64, 64))
    model(torch.zeros(2, 3, 64, 64))


@pytest.mark.parametrize("text", [5, b"bytes", object(), [5], [""], {"a": 1}.values()])
def test_texts(models: dict[str, Any], text: Any) -> None:
    if models["plain"].task != "referring":
        return
    for model in models.values():
        with pytest.raises(InputError, match="text must be a sentence or a list of sentences"):
            model.predict(torch.zeros(3, 64, 64), text=text)


def test_negative_views_of_a_photo() -> None:
    photo = -torch.rand(3, 8, 8)
    assert (read_image(torch._neg_view(photo)) == read_image(-photo)).all()
