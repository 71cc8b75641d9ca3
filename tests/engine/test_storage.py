"""Fast models on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vpd_fast
from vpd_fast import VPD, BackboneConfig, VPDConfig
from vpd_fast.errors import CheckpointError
from vpd_fast.models.random_weights import randomize

SMALL = BackboneConfig(model_channels=32, num_heads=4, context_dim=16, vae_ch=32)


def small_model(task: str) -> VPD:
    config = VPDConfig(task=task, num_classes=7, tokens=5, num_scenes=3, base_size=128, channels=32, backbone=SMALL)
    return randomize(VPD(config), seed=1).eval()


def inputs(task: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(2, 3, 64, 64, generator=generator)
    if task == "referring":
        return images, torch.randn(2, 5, 16, generator=generator)
    return (images, torch.tensor([2, 0])) if task == "depth" else (images,)


def tensor(result: object) -> torch.Tensor:
    return result["pred_d"] if isinstance(result, dict) else result


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("task", ["segmentation", "referring", "depth"])
def test_a_saved_engine_gives_the_same_bits(tmp_path: Path, task: str, precision: str) -> None:
    fast = vpd_fast.optimize(small_model(task), precision)
    fast.save(tmp_path / "engine")
    assert sorted(p.name for p in (tmp_path / "engine").iterdir()) == ["engine.json", "engine.safetensors"]
    loaded = vpd_fast.load_engine(tmp_path / "engine")
    assert type(loaded) is type(fast)
    assert loaded.config == fast.config
    assert loaded.report() == fast.report()
    torch.testing.assert_close(tensor(loaded(*inputs(task))), tensor(fast(*inputs(task))), rtol=0, atol=0)


def test_smoothed_and_calibrated_layers_are_kept(tmp_path: Path) -> None:
    fast = vpd_fast.optimize(small_model("segmentation"), "int8", calibration=[inputs("segmentation")[0]])
    assert any(layer.scale is not None for layer in fast.layers.values() if hasattr(layer, "scale"))
    fast.save(tmp_path)
    loaded = vpd_fast.load_engine(str(tmp_path))
    assert loaded.report(sensitivity=True).rows() == fast.report(sensitivity=True).rows()
    torch.testing.assert_close(loaded(*inputs("segmentation")), fast(*inputs("segmentation")), rtol=0, atol=0)


def test_loading_needs_no_other_weights(tmp_path: Path) -> None:
    """The engine's file is all that is read, and most of it is 8-bit."""
    model = small_model("segmentation")
    fast = vpd_fast.optimize(model, "int8")
    fast.save(tmp_path)
    weights = sum(p.nbytes for p in model.parameters())
    assert (tmp_path / "engine.safetensors").stat().st_size < 0.6 * weights
    code = f"import vpd_fast; print(vpd_fast.load_engine({str(tmp_path)!r}).precision)"
    shown = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "int8"


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no saved engine"):
        vpd_fast.load_engine(tmp_path / "nothing")
    vpd_fast.optimize(small_model("segmentation"), "bf16").save(tmp_path)
    settings = json.loads((tmp_path / "engine.json").read_text())

    def spoiled(**changes: object) -> None:
        (tmp_path / "engine.json").write_text(json.dumps(settings | changes))

    spoiled(format=99)
    with pytest.raises(CheckpointError, match="format"):
        vpd_fast.load_engine(tmp_path)
    spoiled(layers={})
    with pytest.raises(CheckpointError, match="do not fit together"):
        vpd_fast.load_engine(tmp_path)
    (tmp_path / "engine.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a JSON"):
        vpd_fast.load_engine(tmp_path)
    spoiled()
    data = (tmp_path / "engine.safetensors").read_bytes()
    (tmp_path / "engine.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="safetensors"):
        vpd_fast.load_engine(tmp_path)
