"""The configuration from names and shapes alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vpd_fast import VPD, BackboneConfig, VPDConfig
from vpd_fast.checkpoints import infer_config
from vpd_fast.errors import CheckpointError, InputError

CASES = ("seg_small", "seg_small_a64", "refer_small", "depth_small", "seg_sd15", "refer_sd15", "depth_sd15")


def shapes_of(config: VPDConfig) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in VPD.empty(config).state_dict().items()}


@pytest.mark.parametrize("name", CASES)
def test_reference_state_dicts(golden: Callable, name: str) -> None:
    case = golden(name)
    expected = case.config
    shapes = {key: tuple(shape) for key, shape in case.keys.items()}
    hints = {"num_heads": expected.backbone.num_heads}
    if expected.task != "depth":
        hints["base_size"] = expected.base_size
    if name == "seg_small_a64":
        hints["attn_selector"] = expected.attn_selector
    assert infer_config(shapes, **hints) == expected
    # Without hints the shapes still fit, whatever the base size was.
    assert infer_config(shapes).feature_channels == expected.feature_channels


@pytest.mark.parametrize(
    "changes",
    [
        {"model_channels": 64},
        {"context_dim": 48},
        {"num_res_blocks": 2},
        {"num_res_blocks": 3},
        {"channel_mult": (1, 2, 3, 5)},
        {"attention_resolutions": (2, 1)},
        {"attention_resolutions": (4,)},
        {"attention_resolutions": (8, 4, 2, 1)},
        {"vae_ch": 64, "vae_ch_mult": (1, 2, 4, 4)},
        {"vae_num_res_blocks": 2},
        {"in_channels": 8},
    ],
)
def test_backbone_sizes(tiny_backbone: BackboneConfig, changes: dict) -> None:
    backbone = BackboneConfig(**{**vars(tiny_backbone), **changes})
    for sizes in (
        {"task": "segmentation", "channels": 32, "num_classes": 5},
        {"task": "referring", "tokens": 7},
        {"task": "depth", "num_scenes": 3},
    ):
        config = VPDConfig(**sizes, backbone=backbone)
        assert infer_config(shapes_of(config), num_heads=4) == config


@pytest.mark.parametrize("task", ["segmentation", "referring", "depth"])
@pytest.mark.parametrize(
    "changes",
    [
        {"use_attn": False},
        {"max_attn_size": 64},
        {"max_attn_size": 16},
        {"attn_selector": "up_cross+down_cross+mid_cross"},
        {"attn_selector": "up_self+down_self", "max_attn_size": 16},
        {"attn_selector": "up_cross+down_cross+up_self+down_self"},
        {"base_size": 256, "attn_selector": "up_cross+down_cross+up_self+down_self"},
    ],
)
def test_map_settings(tiny_backbone: BackboneConfig, task: str, changes: dict) -> None:
    config = VPDConfig(task=task, channels=32, num_classes=5, tokens=9, num_scenes=3, backbone=tiny_backbone)
    config = config.replace(**{"use_attn": True, **changes})
    try:
        shapes = shapes_of(config)
    except InputError:
        assert task == "depth"  # its GroupNorm of 16 groups rules some out
        return
    found = infer_config(shapes, num_heads=4)
    assert shapes_of(found) == shapes
    if task == "referring" and "cross" not in config.attn_selector:
        # 256 map channels may be 256 tokens: here the selector has to be told.
        found = infer_config(shapes, num_heads=4, attn_selector=config.attn_selector)
    assert found.feature_channels == config.feature_channels


def test_text_adapter_width_and_class_names(small_backbone: BackboneConfig) -> None:
    config = VPDConfig(num_classes=2, channels=32, text_hidden_dim=24, backbone=small_backbone)
    found = infer_config(shapes_of(config), {"class_names": ("sky", "sea")}, num_heads=4)
    assert found == config.replace(class_names=("sky", "sea"))
    assert infer_config(shapes_of(config), {"class_names": ("sky",)}, num_heads=4) == config


def test_overrides(small_backbone: BackboneConfig) -> None:
    config = VPDConfig(task="depth", num_scenes=4, backbone=small_backbone)
    found = infer_config(shapes_of(config), {"max_depth": 5}, num_heads=2, latent_scale=0.18215)
    assert (found.max_depth, found.backbone.num_heads, found.latent_scale) == (5.0, 2, 0.18215)
    assert infer_config(shapes_of(config), {"max_depth": 5}, max_depth=80.0).max_depth == 80.0
    with pytest.raises(CheckpointError, match="num_heads=7"):
        infer_config(shapes_of(config), num_heads=7)


def test_what_is_not_a_model(small_backbone: BackboneConfig) -> None:
    with pytest.raises(CheckpointError, match=r"not a VPD model.*layer1\.weight"):
        infer_config({"layer1.weight": (3, 3)})
    config = VPDConfig(num_classes=5, channels=32, backbone=small_backbone)
    shapes = shapes_of(config)
    with pytest.raises(CheckpointError, match="one embedding a class"):
        infer_config({**shapes, "class_embeddings": (6, 64)})
    with pytest.raises(CheckpointError, match=r"neck\.lateral_convs\.1"):
        infer_config({k: v for k, v in shapes.items() if k != "neck.lateral_convs.1.conv.weight"})
    with pytest.raises(CheckpointError, match="map channels"):
        infer_config({**shapes, "neck.lateral_convs.1.conv.weight": (32, 64 + 3, 1, 1)})
    with pytest.raises(CheckpointError, match="3 levels"):
        infer_config(
            {
                k: v
                for k, v in shapes.items()
                if ".input_blocks.9." not in k and ".input_blocks.10." not in k and ".input_blocks.11." not in k
            }
        )
