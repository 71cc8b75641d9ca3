"""Where a run's initial weights come from: averages over an earlier training, where they are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vpd_fast import VPD, VPDConfig
from vpd_fast.checkpoints import convert, open_checkpoint
from vpd_fast.errors import CheckpointError, InputError
from vpd_fast.models.random_weights import randomize
from vpd_fast.training.build import build_model
from vpd_fast.training.config import TrainConfig

from ..helpers import runs

HEAD = "last_layer_depth.2.bias"
UNET = "encoder.unet.unet.diffusion_model.input_blocks.0.0.weight"


@pytest.fixture(scope="module")
def model() -> VPD:
    config = VPDConfig.from_dict({"task": "depth", "num_scenes": 2, "base_size": 64, "backbone": runs.BACKBONE})
    return randomize(VPD.empty(config), 0)


def configured(data: Path, **init: object) -> TrainConfig:
    return runs.tiny("depth", data, init={"random": None, **init}, model={"num_scenes": 2})


def test_averages_of_a_checkpoint(model: VPD, data: Path, tmp_path: Path) -> None:
    weights = model.state_dict()
    averages = {key: tensor + 1 if key == HEAD else tensor for key, tensor in weights.items()}
    path = tmp_path / "a.pth"
    torch.save({"model": weights, "model_ema": averages}, path)
    for ema, source in ((False, weights), (True, averages)):
        found, _ = build_model(configured(data, checkpoint=str(path), ema=ema), ("a", "b"))
        assert torch.equal(found.state_dict()[HEAD], source[HEAD])


def test_averages_of_stable_diffusion(model: VPD, data: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "sd.ckpt", to="ldm")
    tensors = open_checkpoint(tmp_path / "sd.ckpt").tensors
    averages = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): tensor + 1
        for key, tensor in tensors.items()
        if key.startswith("model.")
    }
    torch.save({"state_dict": {**tensors, **averages}}, tmp_path / "both.ckpt")
    torch.save(torch.zeros(2, runs.BACKBONE["context_dim"]), tmp_path / "embeddings.pth")
    for ema in (False, True):
        init = {"stable_diffusion": str(tmp_path / "both.ckpt"), "class_embeddings": str(tmp_path / "embeddings.pth")}
        found, _ = build_model(configured(data, **init, ema=ema), ("a", "b"))
        assert torch.equal(found.state_dict()[UNET], model.state_dict()[UNET] + ema)


def test_a_file_without_averages_and_random_weights(model: VPD, data: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no averages of the weights"):
        build_model(configured(data, checkpoint=str(tmp_path), ema=True), ("a", "b"))
    with pytest.raises(InputError, match=r"init\.ema goes with init\.checkpoint or init\.stable_diffusion"):
        runs.tiny("depth", data, init={"ema": True}).check_complete()
