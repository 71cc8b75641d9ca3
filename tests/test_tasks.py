"""The table of tasks agrees with the models, the configuration and each other."""

from __future__ import annotations

import math

import pytest

from vpd_fast import VPD, BackboneConfig, VPDConfig, config
from vpd_fast.tasks import TASKS

SMALL = BackboneConfig(model_channels=32, num_heads=4, vae_ch=32)


def test_they_are_names_to_those_who_iterate() -> None:
    assert config.TASKS is TASKS
    assert list(TASKS) == ["segmentation", "referring", "depth"]
    assert "depth" in TASKS
    assert "sound" not in TASKS


@pytest.mark.parametrize("name", TASKS)
def test_weights_tell_the_task(name: str) -> None:
    keys = VPD.empty(VPDConfig(task=name, backbone=SMALL)).state_dict().keys()
    assert [task for task in TASKS if all(key in keys for key in TASKS[task].signature)] == [name]
    assert f"{TASKS[name].key_prefix}gamma" in keys
    assert (f"{TASKS[name].key_prefix}class_embeddings" in keys) != TASKS[name].takes_text


def test_counts_of_embeddings() -> None:
    counts = {name: VPDConfig(task=name, num_classes=7, num_scenes=3).embedding_count for name in TASKS}
    assert counts == {"segmentation": 7, "referring": None, "depth": 3}
    assert [VPDConfig(task=name).key_prefix for name in TASKS] == ["", "", "encoder."]


def test_which_metric_is_better() -> None:
    assert TASKS["segmentation"].is_better(0.5, 0.4)
    assert TASKS["depth"].is_better(0.4, 0.5)
    assert not any(task.is_better(math.nan, 0.5) or task.is_better(0.5, 0.5) for task in TASKS.values())
