"""Golden cases as checkpoints of every origin: as released, as ported, as Stable Diffusion."""

from __future__ import annotations

import argparse
import copy
import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vpd_fast import VPD
from vpd_fast.checkpoints.formats import vpd_to_ldm

NAMES = tuple(f"class {i}" for i in range(6))


@functools.cache
def weights_of(golden: Callable, name: str) -> dict[str, Tensor]:
    case = golden(name)
    return case.state_dict({key: tuple(shape) for key, shape in case.keys.items()})


def reference_weights(case: Any) -> dict[str, Tensor]:
    """Everything the original model's state dict holds, unused parts included."""
    return dict(weights_of(type(case), case.name))


def reference_model(case: Any, **changes: Any) -> VPD:
    """The plain model with these weights."""
    model = VPD.empty(case.config.replace(**changes))
    model.load_state_dict({name: x.clone() for name, x in reference_weights(case).items()}, assign=True)
    return model.eval()


@functools.cache
def _expected(golden: Callable, name: str, max_depth: float) -> tuple[VPD, Tensor]:
    """The plain model and its answer, for tests that only read them."""
    model = reference_model(golden(name), max_depth=max_depth)
    return model, outputs(model)


def released(case: Any) -> dict[str, Any]:
    """The containers of the original training code."""
    weights = OrderedDict(reference_weights(case))
    if case.settings["task"] == "segmentation":
        meta = {"mmcv_version": "1.6.2", "CLASSES": NAMES, "PALETTE": [[0, 0, 0]] * 6, "config": "norm_cfg = 1"}
        return {"meta": meta, "state_dict": weights, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}
    arguments = argparse.Namespace(max_depth=8.0, model="vpd")
    if case.settings["task"] == "depth":
        weights = OrderedDict((f"module.{key}", value) for key, value in weights.items())
    return {"model": weights, "optimizer": {}, "epoch": 3, "args": arguments, "lr_scheduler": {"last_epoch": 3}}


def mmseg_port(case: Any) -> dict[str, Any]:
    """The depth model as mmsegmentation 1.x saves it: 28 embeddings, the image decoder still there."""
    table = (
        ("encoder.layer1.", "decode_head.conv1."),
        ("encoder.layer2.0.", "decode_head.conv2."),
        ("encoder.out_layer.", "decode_head.conv_aggregation."),
        ("encoder.", "backbone."),
        ("decoder.", "decode_head.decoder."),
        ("last_layer_depth.", "decode_head.depth_pred_layer."),
    )
    weights = {}
    for key, value in reference_weights(case).items():
        ours, theirs = next(pair for pair in table if key.startswith(pair[0]))
        weights[theirs + key[len(ours) :]] = value
    embeddings = weights["backbone.class_embeddings"]
    weights["backbone.class_embeddings"] = torch.cat([embeddings, embeddings.mean(0, keepdim=True)])
    weights["backbone.encoder_vq.decoder.conv_in.weight"] = torch.ones(4, 4, 3, 3)
    meta = {"dataset_meta": {"classes": ("a", "b")}, "seed": 1}
    return {"meta": meta, "state_dict": weights, "message_hub": {"log_scalars": argparse.Namespace()}}


def stable_diffusion(case: Any) -> dict[str, Tensor]:
    """ldm's names: the UNet and encoder of the case, and parts that VPD leaves out."""
    weights = vpd_to_ldm(reference_weights(case))
    weights["first_stage_model.decoder.conv_in.weight"] = torch.ones(32, 4, 3, 3)
    weights["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"] = torch.ones(9, 64)
    weights["model_ema.diffusion_modelout0weight"] = torch.ones(32)
    weights |= {"betas": torch.ones(10), "sqrt_recip_alphas_cumprod": torch.ones(10), "model_ema.decay": torch.ones(())}
    return weights


def outputs(model: VPD) -> Tensor:
    """The model's answer for a small picture, in float64: equal weights leave rounding of 1e-16 an operation."""
    model = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(1, 3, 64, 64, generator=generator).double()
    with torch.no_grad():
        if model.config.task == "depth":
            return model(images, torch.tensor([3]))["pred_d"]
        tokens = torch.randn(1, model.config.tokens, model.config.backbone.context_dim, generator=generator).double()
        return model(images, tokens) if model.config.task == "referring" else model(images)


def check_same_outputs(model: VPD, expected: VPD | Tensor) -> None:
    """expected: a model, or its outputs."""
    # Not bit by bit: libraries choose loops by the alignment of the weights, and that of a mapped file is arbitrary.
    # In float64 a few thousand roundings of 1e-16 stay below 1e-12; a wrong weight does not stay below 1e-9.
    answer = expected if isinstance(expected, Tensor) else outputs(expected)
    torch.testing.assert_close(outputs(model), answer, rtol=1e-9, atol=1e-9)


def check_same(model: VPD, case: Any) -> None:
    assert model.config.task == case.settings["task"]
    assert not model.training
    expected, answer = _expected(type(case), case.name, model.config.max_depth)
    weights = model.state_dict()
    assert list(weights) == list(expected.state_dict())
    for key, value in expected.state_dict().items():
        assert torch.equal(weights[key], value), key
    check_same_outputs(model, answer)
    requires = {name: p.requires_grad for name, p in expected.named_parameters()}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == requires
