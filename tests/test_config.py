"""VPDConfig and BackboneConfig: defaults, derived sizes, JSON round trip, bad values."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from vpd_fast import BackboneConfig, VPDConfig
from vpd_fast.errors import InputError


def test_defaults_are_the_released_models() -> None:
    assert VPDConfig().feature_channels == (320, 790, 1430, 1280)
    assert VPDConfig(task="referring").feature_channels == (320, 680, 1320, 1280)
    assert VPDConfig(task="depth").feature_channels == (320, 640, 1280, 1280)
    assert VPDConfig(task="depth").use_attn is False
    assert VPDConfig(max_attn_size=64).feature_channels == (470, 790, 1430, 1280)


def test_map_channels_follow_the_selector() -> None:
    assert VPDConfig(attn_selector="mid_cross").feature_channels == (320, 640, 1280, 1430)
    assert VPDConfig(attn_selector="up_self").feature_channels == (320, 640 + 1024, 1280 + 256, 1280)
    assert VPDConfig(attn_selector="mid_self+up_cross").feature_channels == (320, 790, 1430, 1280 + 64)
    assert VPDConfig(attn_selector="up_cross", max_attn_size=16).feature_channels == (320, 640, 1430, 1280)


def test_json_round_trip(tmp_path: Path) -> None:
    config = VPDConfig(
        task="depth", num_scenes=2, class_names=("a", "b"), backbone=BackboneConfig(model_channels=64, num_heads=4)
    )
    config.save(tmp_path / "config.json")
    assert VPDConfig.load(tmp_path / "config.json") == config
    assert VPDConfig.from_dict(config.to_dict()) == config
    assert config.replace(num_scenes=1, class_names=()).num_scenes == 1


NUMBERS = [
    "num_classes", "tokens", "num_scenes", "max_depth", "channels", "base_size", "max_attn_size", "gamma_init_value",
    "latent_scale", "text_hidden_dim",
]  # fmt: skip
WRONG = ["x", [1], True, math.nan, math.inf, 2**80, {"a": 1}]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "detection"}, "segmentation, referring, depth, got 'detection'"),
        ({"attn_selector": "up_cross+side_cross"}, r"unknown \['side_cross'\]"),
        ({"attn_selector": ""}, "unknown"),
        ({"num_classes": 0}, "num_classes must be from 1 to .*, got 0"),
        ({"num_classes": 2.0}, "num_classes must be a whole number, got 2.0"),
        ({"base_size": 500}, "multiple of 64, got 500"),
        ({"max_depth": -1.0}, "max_depth must be from 1e-06"),
        ({"class_names": ["a"]}, "has 1 names, the segmentation model needs 150"),
        ({"class_names": 5}, "class_names must be a list of texts, got 5"),
        ({"class_names": "abc"}, "class_names must be a list of texts"),
        ({"class_names": [1] * 150}, "class_names must be a text, got 1"),
        ({"max_depth": "x"}, "max_depth must be a number, got 'x'"),
        ({"max_depth": "1"}, "max_depth must be a number, got '1'"),
        ({"colour": 1}, "colour is not a setting"),
        ({"backbone": {"depth": 1}}, r"backbone\.depth is not a setting"),
        ({"backbone": 3}, "backbone must be a section of settings, got 3"),
        *((({name: value}), f"{name} must be") for name in NUMBERS for value in WRONG),
    ],
)
def test_bad_values(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        VPDConfig.from_dict(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_channels": 48}, "multiple of 32"),
        ({"num_heads": 7}, "does not divide"),
        ({"channel_mult": (1, 2)}, "4 levels"),
        ({"context_dim": -1}, "context_dim must be from 1"),
        ({"num_res_blocks": 10**9}, "num_res_blocks must be from 1 to 8"),
        ({"vae_num_res_blocks": "2"}, "vae_num_res_blocks must be a whole number"),
        ({"vae_ch_mult": (1, 2, 4, 10**6)}, "vae_ch_mult must be from 1 to 64"),
        ({"channel_mult": (1, 2, 4, "4")}, "channel_mult must be a whole number"),
        ({"attention_resolutions": 4}, "attention_resolutions must be a list of numbers"),
    ],
)
def test_bad_backbones(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        BackboneConfig(**values)
