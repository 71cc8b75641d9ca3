"""Random weights: what they depend on, and that they are drawn where they are wanted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vpd_fast import VPD, VPDConfig
from vpd_fast.cli import options
from vpd_fast.models.random_weights import randomize


@pytest.fixture
def config(tiny_backbone) -> VPDConfig:
    return VPDConfig(num_classes=3, channels=32, base_size=64, backbone=tiny_backbone)


def test_they_depend_on_name_shape_and_seed(config: VPDConfig) -> None:
    first, again, other = (randomize(VPD.empty(config), seed).state_dict() for seed in (0, 0, 1))
    smaller = randomize(VPD.empty(VPDConfig(num_classes=2, channels=32, base_size=64, backbone=config.backbone)))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert tensor.dim() < 2 or not torch.equal(tensor, other[name])
    name = "encoder_vq.encoder.conv_in.weight"
    assert torch.equal(first[name], smaller.state_dict()[name])
    matrix = first["unet.unet.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight"]
    assert matrix.std().item() == pytest.approx(matrix.shape[1] ** -0.5, rel=0.05)


def test_they_are_drawn_where_they_are_wanted(config: VPDConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    device, drawn, draw = torch.device("cpu"), [], torch.randn

    def randn(*args: Any, **given: Any) -> torch.Tensor:
        drawn.append((given["device"], given["generator"].device))
        return draw(*args, **given)

    monkeypatch.setattr(torch, "randn", randn)
    randomize(VPD.empty(config), device=device)
    assert drawn
    assert all(where is device and generator == device for where, generator in drawn)


def test_the_command_line_draws_the_same_wherever_a_model_runs(
    config: VPDConfig, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.save(tmp_path / "config.json")
    drawn = []
    monkeypatch.setattr(options, "randomize", lambda model, *given: drawn.append(given) or randomize(model))
    monkeypatch.setattr(options, "_device", lambda _: torch.device("cpu"))  # as if there were the other
    chosen = options.ModelOptions(None, 7, None, tmp_path / "config.json", "cuda", None)
    chosen.load()
    chosen.load(drawn_on="cuda")  # as benchmarks do
    assert drawn == [(7, "cpu"), (7, "cuda")]


@pytest.mark.gpu
def test_a_gpu_draws_them(config: VPDConfig) -> None:
    first, again = (randomize(VPD.empty(config), 3, "cuda").state_dict() for _ in range(2))
    for name, tensor in first.items():
        assert tensor.is_cuda
        assert torch.equal(tensor, again[name])
        if tensor.numel() > 1 << 14:
            assert tensor.std().item() == pytest.approx(tensor[0].numel() ** -0.5, rel=0.1), name
