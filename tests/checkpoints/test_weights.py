"""What becomes of a file's weights: in memory or mapped, apart from the file afterwards, finite, and within a dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vpd_fast import VPD, VPDConfig
from vpd_fast.checkpoints import (
    convert,
    load_checkpoint,
    load_pretrained,
    read_tensor,
    save_pretrained,
)
from vpd_fast.errors import CheckpointError
from vpd_fast.models.random_weights import randomize

from ..helpers import processes
from ..helpers.backbones import TINY
from ..helpers.released import (
    check_same_outputs,
    reference_model,
    reference_weights,
)


@pytest.mark.parametrize("kind", ["zip", "safetensors"])
def test_training_a_mapped_model_leaves_the_file_alone(golden: Callable, tmp_path: Path, kind: str) -> None:
    case = golden("seg_small")
    if kind == "zip":
        path = tmp_path / "a.pth"
        torch.save(reference_weights(case), path)
    else:
        path = tmp_path / "a.safetensors"
        save_file(reference_weights(case), path)
    before = path.read_bytes()
    model = load_checkpoint(path, num_heads=4, base_size=128).train()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.rand(2, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, start[name])]
    assert "decode_head.conv_seg.weight" in moved
    assert "unet.unet.diffusion_model.input_blocks.0.0.weight" in moved
    assert path.read_bytes() == before


def test_names_for_the_same_bytes_become_separate_parameters(golden: Callable, tmp_path: Path) -> None:
    weights = reference_weights(golden("seg_small"))
    first, second = "neck.fpn_convs.0.conv.weight", "neck.fpn_convs.1.conv.weight"
    weights[second] = weights[first]
    torch.save(weights, tmp_path / "a.pth")
    state = load_checkpoint(tmp_path / "a.pth", num_heads=4, base_size=128).state_dict()
    state[first].zero_()
    assert torch.equal(state[second], weights[second])


def test_saving_over_the_file_that_is_loaded(golden: Callable, tmp_path: Path) -> None:
    case = golden("depth_small")
    reference_model(case).save_pretrained(tmp_path)
    model = load_pretrained(tmp_path)
    with torch.no_grad():
        model.last_layer_depth[2].bias += 1
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    check_same_outputs(again, model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def load_change_and_save(path: Path) -> None:
    """A program that writes over the file that its model was loaded from."""
    model = VPD.from_checkpoint(path, num_heads=4, base_size=128)
    path = path / "model.safetensors" if path.is_dir() else path
    with torch.no_grad():
        model.decode_head.conv_seg.bias += 1
    if path.suffix == ".pth":
        torch.save({"model": model.state_dict()}, path)
    else:
        save_file(model.state_dict(), path)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "own"])
def test_saving_over_the_file_that_is_loaded_by_other_means(golden: Callable, tmp_path: Path, name: str) -> None:
    """torch.save and safetensors cut the file first: a model that still lay in it would end the process."""
    model = reference_model(golden("seg_small"))
    path = tmp_path / name
    model.save_pretrained(tmp_path / "own")
    if name == "a.pth":
        torch.save({"model": model.state_dict()}, path)
    elif name == "a.safetensors":
        save_file(model.state_dict(), path)
    processes.run(load_change_and_save, path, log=tmp_path / "log")
    loaded = load_checkpoint(path, num_heads=4, base_size=128)
    key = "decode_head.conv_seg.bias"
    assert torch.equal(loaded.state_dict()[key], model.state_dict()[key] + 1)
    assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("kind", ["zip", "safetensors"])
def test_models_that_are_mapped_and_not(golden: Callable, tmp_path: Path, kind: str) -> None:
    case, path = golden("depth_small"), tmp_path / f"a.{kind}"
    weights = {key: value.contiguous() for key, value in reference_weights(case).items()}
    if kind == "zip":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    key = "last_layer_depth.0.weight"
    mapped, read = (load_checkpoint(path, num_heads=4, base_size=128, mmap=mmap) for mmap in (True, False))
    assert torch.equal(mapped.state_dict()[key], weights[key])
    data = bytearray(path.read_bytes())
    path.write_bytes(data.replace(weights[key].numpy().tobytes(), bytes(weights[key].nbytes)))  # as long as before
    assert torch.equal(read.state_dict()[key], weights[key])


@functools.cache
def depth_weights() -> dict[str, Tensor]:
    """Of a small depth model, to be read only."""
    config = VPDConfig(task="depth", num_scenes=3, base_size=128, backbone=TINY)
    return dict(randomize(VPD.empty(config), 1).state_dict())


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(tmp_path: Path, kind: str, value: float) -> None:
    weights = dict(depth_weights())
    key = "last_layer_depth.0.weight"
    weights[key] = weights[key].clone()
    weights[key].view(-1)[3] = value
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pth")
    if kind == "safetensors":
        save_file({k: v.contiguous() for k, v in weights.items()}, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "zip")
    for mmap in (False, True):
        with pytest.raises(CheckpointError, match=rf"{key} has 1 of \d+ values that are NaN or infinite"):
            load_checkpoint(path, num_heads=4, base_size=128, mmap=mmap)
    with pytest.raises(CheckpointError, match=rf"{key} has 1 of"):
        convert(path, tmp_path / "b", to="pretrained", num_heads=4, base_size=128)
    assert not (tmp_path / "b" / "model.safetensors").exists()


def test_weights_too_large_for_a_dtype(tmp_path: Path) -> None:
    weights = dict(depth_weights())
    key = "last_layer_depth.0.weight"
    weights[key] = weights[key].clone()
    weights[key].view(-1)[3] = 7e4
    torch.save(weights, tmp_path / "a.pth")
    options = {"num_heads": 4, "base_size": 128}
    message = rf"{key} has values up to 7e\+04, which float16 cannot hold; choose bfloat16"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "a.pth", dtype=torch.float16, **options)
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "a.pth", tmp_path / "b", to="pretrained", dtype=torch.float16, **options)
    assert load_checkpoint(tmp_path / "a.pth", dtype=torch.bfloat16, **options).state_dict()[key].max() > 6e4


def test_class_embeddings_that_are_not_finite(golden: Callable, tmp_path: Path) -> None:
    torch.save(torch.full((3, 4), torch.nan), tmp_path / "e.pth")
    with pytest.raises(CheckpointError, match="12 of 12 values"):
        read_tensor(tmp_path / "e.pth")
