"""Fast models on disk."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vpd_fast
from vpd_fast import VPD, VPDConfig
from vpd_fast.engine import Policy
from vpd_fast.engine.model import FastVPD
from vpd_fast.errors import CheckpointError, InputError
from vpd_fast.models.random_weights import randomize

from ..helpers import processes
from ..helpers.backbones import TINY

TINY_16 = dataclasses.replace(TINY, context_dim=16)


def small_model(task: str) -> VPD:
    config = VPDConfig(task=task, num_classes=7, tokens=5, num_scenes=3, base_size=128, channels=32, backbone=TINY_16)
    return randomize(VPD(config), seed=1).eval()


@functools.cache
def fast_model(task: str, precision: str = "int8") -> FastVPD:
    """Of that model; all tests have the same one."""
    return vpd_fast.optimize(small_model(task), precision)


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
    fast = fast_model(task, precision)
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


def print_precision(folder: Path) -> None:
    print(vpd_fast.load_engine(folder).precision)


def test_loading_needs_no_other_weights(tmp_path: Path) -> None:
    """The engine's file is all that is read, and most of it is 8-bit."""
    model, fast = small_model("segmentation"), fast_model("segmentation")
    fast.save(tmp_path)
    weights = sum(p.nbytes for p in model.parameters())
    assert (tmp_path / "engine.safetensors").stat().st_size < 0.6 * weights
    assert processes.run(print_precision, tmp_path, log=tmp_path / "log") == "int8\n"


def save_pair(folder: Path) -> tuple[Path, Path]:
    """Engines of two widths, which have layers of the same names."""
    for name, width in (("small", 32), ("large", 64)):
        backbone = dataclasses.replace(TINY, model_channels=width)
        config = VPDConfig(num_classes=7, base_size=128, channels=32, backbone=backbone)
        vpd_fast.optimize(randomize(VPD(config), seed=1).eval(), "int8").save(folder / name)
    return folder / "small", folder / "large"


def test_settings_of_another_engine(tmp_path: Path) -> None:
    """Sizes that the tensors do not have would make native code read beyond them."""
    small, large = save_pair(tmp_path)
    settings = (large / "engine.json").read_text()
    (small / "engine.json").write_text(settings)
    with pytest.raises(CheckpointError, match="stored as"):
        vpd_fast.load_engine(small)
    changed = json.loads(settings)
    changed["config"]["backbone"]["model_channels"] = 32
    (large / "engine.json").write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match="expected"):
        vpd_fast.load_engine(large)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("unet.conv_in", {"n": 100_000}, "stored as"),
        ("unet.conv_in", {"k": 1}, "stored as"),
        ("unet.conv_in", {"out_dtype": "load"}, "load"),
        ("unet.input_blocks.1.1.proj_in", {"kind": "group_norm"}, "do not fit"),
        ("unet.conv_in", {"kernel": 3}, r"conv_in: kernel is 3, expected \(3, 3\)"),
        ("unet.conv_in", {"kernel": [9, 1]}, r"kernel is \(9, 1\)"),
        ("unet.conv_in", {"stride": 0}, "stride is 0, expected 1"),
        ("unet.conv_in", {"padding": [1, 1]}, "padding is"),
        ("unet.conv_in", {"silu": "yes"}, "silu is 'yes', expected False"),
        ("unet.conv_in", {"activation": "tanh"}, "activation is 'tanh', expected None"),
        ("unet.conv_in", {"out_dtype": "float32"}, "out_dtype is torch.float32, expected torch.bfloat16"),
        ("unet.conv_in", {"out_dtype": []}, "do not fit"),
        ("unet.conv_in", {"n": "x"}, "do not fit"),
        ("unet.conv_in", {"colour": 1}, "do not fit"),
        ("unet.input_blocks.1.1.proj_in", {"eps": "x"}, "eps is 'x'"),
        ("unet.input_blocks.1.1.norm", {"groups": 7}, "groups is 7, expected 32"),
        ("unet.input_blocks.1.1.norm", {"eps": True}, "eps is True"),
        ("unet.input_blocks.1.1.proj_in", None, "not those of the configuration"),
    ],
)
def test_spoiled_layers(tmp_path: Path, name: str, change: dict | None, message: str) -> None:
    fast_model("segmentation").save(tmp_path)
    settings = json.loads((tmp_path / "engine.json").read_text())
    if change is None:  # missing from both files
        del settings["layers"][name]
        tensors = load_file(tmp_path / "engine.safetensors")
        kept = {key: t for key, t in tensors.items() if not key.startswith(f"{name}:")}
        save_file(kept, tmp_path / "engine.safetensors")
    else:
        settings["layers"][name] |= change
    (tmp_path / "engine.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        vpd_fast.load_engine(tmp_path)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("unet.conv_in:bias", lambda t: t[1:], "bias is torch.float32"),
        ("unet.conv_in:bias", lambda t: t.half(), "bias is torch.float16"),
        ("unet.conv_in:bias", lambda t: t * torch.nan, "bias has 32 of 32 values that are NaN"),
        ("unet.conv_in:bias", lambda t: None, "bias is missing"),
        ("unet.input_blocks.1.1.norm:weight", lambda t: t[None], "do not fit"),
        ("conditioning:gamma", lambda t: t * torch.inf, "gamma has .* NaN or infinite"),
        ("conditioning:gamma", lambda t: t[1:], "gamma is"),
        ("conditioning:gamma", lambda t: t.double(), "gamma is torch.float64"),
        ("conditioning:gamma", lambda t: None, "beside the layers"),
    ],
)
def test_spoiled_tensors(tmp_path: Path, key: str, change: object, message: str) -> None:
    fast_model("segmentation").save(tmp_path)
    tensors = load_file(tmp_path / "engine.safetensors")
    spoiled = change(tensors.pop(key))
    save_file(tensors if spoiled is None else tensors | {key: spoiled}, tmp_path / "engine.safetensors")
    with pytest.raises(CheckpointError, match=message):
        vpd_fast.load_engine(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: "[" * 100_000, "not a JSON file of settings"),
        (lambda s: json.dumps(s).replace('"eps": 1e-05', '"eps": NaN', 1), "NaN is no JSON"),
        (lambda s: json.dumps(s | {"config": {**s["config"], "latent_scale": "x"}}), "latent_scale must be a number"),
        (lambda s: with_backbone(s, num_res_blocks=10**9), "num_res_blocks must be from 1 to 8"),
        (lambda s: with_backbone(s, num_res_blocks=8, vae_num_res_blocks=8), "not those of the configuration"),
        (lambda s: json.dumps(s | {"layers": {}}), "0 layers; a model of this configuration"),
        (lambda s: json.dumps(s | {"precision": "int4"}), "do not fit"),
        (lambda s: json.dumps(s | {"precision": ["int8"]}), "do not fit"),
        (lambda s: json.dumps(s | {"layers": list(s["layers"])}), "do not fit"),
        (lambda s: json.dumps(s | {"report": [{"name": 5}]}), "do not fit"),
        (lambda s: json.dumps([s]), "JSON object"),
    ],
)
def test_spoiled_settings(tmp_path: Path, change: object, message: str) -> None:
    fast_model("segmentation").save(tmp_path)
    (tmp_path / "engine.json").write_text(change(json.loads((tmp_path / "engine.json").read_text())))
    with pytest.raises(CheckpointError, match=message) as caught:
        vpd_fast.load_engine(tmp_path)
    assert len(str(caught.value)) < 600


def with_backbone(settings: dict, **changes: int) -> str:
    backbone = {**settings["config"]["backbone"], **changes}
    return json.dumps({**settings, "config": {**settings["config"], "backbone": backbone}})


@pytest.mark.parametrize(
    ("precision", "value", "message"),
    [
        ("fp32", torch.nan, r"unet\.conv_in: its weight has 1 of \d+ values that are NaN"),
        ("bf16", torch.inf, r"unet\.conv_in: its weight has 1 of \d+ values that are NaN or infinite"),
        ("fp16", 7e4, r"unet\.conv_in: its weight has values up to 7e\+04, which float16 cannot hold"),
    ],
)
def test_weights_that_an_engine_cannot_hold(precision: str, value: float, message: str) -> None:
    model = small_model("segmentation")
    with torch.no_grad():
        model.unet.unet.diffusion_model.input_blocks[0].get_submodule("0").weight.view(-1)[0] = value
    with pytest.raises(InputError, match=message):
        vpd_fast.optimize(model, precision, policy=Policy(winograd=False, emulate=True))


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    fast, path = fast_model("segmentation", "bf16"), tmp_path / "file"
    path.write_text("something")
    with pytest.raises(CheckpointError, match="no saved engine"):
        vpd_fast.load_engine(path)
    with pytest.raises(CheckpointError, match="cannot be written"):
        fast.save(path)
    assert path.read_text() == "something"


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_copies_are_independent(task: str) -> None:
    fast = fast_model(task)
    expected = tensor(fast(*inputs(task)))
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        torch.testing.assert_close(tensor(copied(*inputs(task))), expected, rtol=0, atol=0)
        assert copied._text._layers is copied.layers
        assert copied._workspaces is not fast._workspaces


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no saved engine"):
        vpd_fast.load_engine(tmp_path / "nothing")
    fast_model("segmentation", "bf16").save(tmp_path)
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
    tensors = load_file(tmp_path / "engine.safetensors")
    save_file(tensors | {"unet.other:bias": torch.zeros(3)}, tmp_path / "engine.safetensors")
    with pytest.raises(CheckpointError, match="engine.json does not know: unet.other"):
        vpd_fast.load_engine(tmp_path)
    data = (tmp_path / "engine.safetensors").read_bytes()
    (tmp_path / "engine.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="safetensors"):
        vpd_fast.load_engine(tmp_path)
