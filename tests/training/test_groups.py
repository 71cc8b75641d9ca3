"""Groups against the original's rules, for names of the released checkpoints."""

from __future__ import annotations

import pytest

from vpd_fast import VPD, VPDConfig
from vpd_fast.errors import InputError
from vpd_fast.training.groups import parameter_groups

UNET = "unet.unet.diffusion_model."
NORM = UNET + "input_blocks.1.1.transformer_blocks.0.norm1.weight"
ATTENTION = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
GROUP_NORM = UNET + "input_blocks.1.0.in_layers.0.weight"  # a normalisation without "norm" in its name
# {task: {quirks: {parameter: (factor on the learning rate, whether it decays)}}}
TABLE = {
    "segmentation": {
        True: {
            NORM: (1.0, False), ATTENTION: (0.1, True), GROUP_NORM: (0.1, True), "gamma": (1.0, True),
            "text_adapter.fc.0.weight": (1.0, True), "decode_head.scale_heads.0.0.bn.weight": (1.0, True),
        },
        False: {NORM: (0.1, False), ATTENTION: (0.1, True), GROUP_NORM: (0.1, True), "gamma": (1.0, True)},
    },
    "referring": {
        True: {NORM: (1.0, False), ATTENTION: (1.0, True), GROUP_NORM: (1.0, True), "gamma": (1.0, True)},
        False: {NORM: (0.01, False), ATTENTION: (0.01, True), GROUP_NORM: (0.01, True), "gamma": (1.0, True)},
    },
    "depth": {
        quirks: {
            "encoder." + NORM: (0.01, False), "encoder." + ATTENTION: (0.01, True),
            "encoder." + GROUP_NORM: (0.01, False), "encoder.gamma": (1.0, False),
            "encoder.text_adapter.fc.0.weight": (1.0, True), "encoder.text_adapter.fc.0.bias": (1.0, False),
            "last_layer_depth.0.bias": (1.0, False), "last_layer_depth.0.weight": (1.0, True),
        } for quirks in (True, False)
    },
}  # fmt: skip


@pytest.mark.parametrize("quirks", [True, False])
@pytest.mark.parametrize("task", TABLE)
def test_rules(tiny_backbone, task, quirks):
    model = VPD.empty(VPDConfig(task=task, backbone=tiny_backbone))
    groups = parameter_groups(model, lr=2.0, weight_decay=0.5, preset=task, quirks=quirks)
    found = {id(p): (g["lr_scale"], g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    names = dict(model.named_parameters())
    for name, (scale, decay) in TABLE[task][quirks].items():
        assert found[id(names[name])] == (scale, 2 * scale, 0.5 * decay), name
    assert len({g["name"] for g in groups}) == len(groups)


@pytest.mark.parametrize("task", TABLE)
def test_every_parameter_that_trains_is_in_one_group(tiny_backbone, task):
    model = VPD.empty(VPDConfig(task=task, backbone=tiny_backbone))
    groups = parameter_groups(model, lr=1.0, weight_decay=0.0, preset=task)
    grouped = [id(p) for g in groups for p in g["params"]]
    assert len(set(grouped)) == len(grouped)
    assert set(grouped) == {id(p) for name, p in model.named_parameters() if "encoder_vq" not in name}


@pytest.mark.parametrize("task", TABLE)
def test_the_rate_of_the_unet_can_be_chosen(tiny_backbone, task):
    model = VPD.empty(VPDConfig(task=task, backbone=tiny_backbone))
    groups = parameter_groups(model, lr=2.0, weight_decay=0.1, preset=task, unet_lr_scale=0.3)
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        if "encoder_vq" not in name:
            assert rates[id(parameter)] == (2.0 * 0.3 if "unet" in name else 2.0), name


def test_an_encoder_that_trains_is_slow_like_the_unet(tiny_backbone):
    model = VPD.empty(VPDConfig(task="segmentation", backbone=tiny_backbone, train_encoder=True))
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, preset="segmentation")
    assert {g["lr"] for g in groups if g["name"] == "encoder"} == {0.1}
    with pytest.raises(InputError, match="'pose'"):
        parameter_groups(model, lr=1.0, weight_decay=0.1, preset="pose")
