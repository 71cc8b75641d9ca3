"""The class, scene and template lists are facts: released checkpoints depend on every name and its place."""

from __future__ import annotations

import hashlib

import pytest

from vpd_fast import VPDConfig
from vpd_fast.errors import InputError
from vpd_fast.labels import ADE20K_CLASSES, IMAGENET_TEMPLATES, NYU_SCENES, default_names, find_name


def _digest(names):
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def test_imagenet_templates_are_the_80_of_the_original():
    assert len(IMAGENET_TEMPLATES) == len(set(IMAGENET_TEMPLATES)) == 80
    expected = "a8a4822f2921936e2ef07cf2e7a5df69be9532aab2f3f4880156bb03563e2467"
    assert _digest(sorted(IMAGENET_TEMPLATES)) == expected


@pytest.mark.parametrize(
    ("names", "count", "expected"),
    [
        (ADE20K_CLASSES, 150, "f9dbd8a75a0722c971d8c82db76dc205e06cb422d98153f4e5bbf90408ef5438"),
        (NYU_SCENES, 27, "8c71013cb02dcaabf945d8db7403044308c9d106e8c528b0d7cf5aef7cc34dcf"),
    ],
)
def test_names_and_order(names, count, expected):
    assert len(names) == len(set(names)) == count
    assert _digest(names) == expected


def test_default_names():
    assert default_names(VPDConfig()) == ADE20K_CLASSES
    assert default_names(VPDConfig(num_classes=2)) == ("class 0", "class 1")
    assert default_names(VPDConfig(num_classes=2, class_names=("good", "bad"))) == ("good", "bad")
    assert default_names(VPDConfig(task="depth")) == NYU_SCENES
    assert default_names(VPDConfig(task="depth", num_scenes=28)) == (*NYU_SCENES, "mean")
    assert default_names(VPDConfig(task="depth", num_scenes=1)) == ("scene 0",)
    assert default_names(VPDConfig(task="referring")) == ()


def test_find_name():
    assert (
        find_name("living room", NYU_SCENES) == find_name("Living_Room", NYU_SCENES) == find_name("2", NYU_SCENES) == 2
    )
    with pytest.raises(InputError, match=r"unknown scene 'bathrom'; did you mean bathroom"):
        find_name("bathrom", NYU_SCENES, "scene")
    with pytest.raises(InputError, match="class number must be 0 to 149, got 150"):
        find_name(150, ADE20K_CLASSES)
    with pytest.raises(InputError, match="unknown class 'xyzzy'; known: good, bad"):
        find_name("xyzzy", ("good", "bad"))
