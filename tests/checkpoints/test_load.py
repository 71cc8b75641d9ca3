"""Models from files as released, as ported, as Stable Diffusion, and from broken or unfitting ones."""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vpd_fast import VPD, BackboneConfig, VPDConfig
from vpd_fast.checkpoints import (
    load_checkpoint,
    load_pretrained,
    load_stable_diffusion,
    save_pretrained,
)
from vpd_fast.errors import CheckpointError, InputError
from vpd_fast.models import VPDDepth

from ..helpers.released import (
    NAMES,
    check_same,
    check_same_outputs,
    mmseg_port,
    outputs,
    reference_model,
    reference_weights,
    released,
    stable_diffusion,
)

CASES = ("seg_small", "refer_small", "depth_small")
QUICK = ("seg_small", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES[1:]))


@pytest.mark.parametrize(("name", "zipped"), [*((name, True) for name in CASES), ("depth_small", False)])
def test_released_files(golden: Callable, tmp_path: Path, name: str, zipped: bool) -> None:
    case = golden(name)
    path = tmp_path / "vpd.ckpt"
    torch.save(released(case), path, _use_new_zipfile_serialization=zipped)
    model = VPD.from_checkpoint(path, num_heads=4, base_size=case.config.base_size)
    check_same(model, case)
    report = model.load_report
    assert (report.format, report.missing, report.unexpected) == ("vpd", [], [])
    assert set(report.loaded) == set(model.state_dict())
    leftovers = set(case.keys) - set(report.loaded)
    assert {key for keys in report.ignored.values() for key in keys} == leftovers
    assert model.config.class_names == (NAMES if name == "seg_small" else ())
    assert model.config.max_depth == (8.0 if name == "depth_small" else 10.0)
    if name != "seg_small":
        assert "argparse.Namespace" in str(report)
        assert {"optimizer", "epoch"} <= set(report.contents)
    else:
        assert "diffusion schedule: 12: sd_model." in str(report)


@pytest.mark.parametrize("name", QUICK)
def test_bare_state_dicts(golden: Callable, tmp_path: Path, name: str) -> None:
    case = golden(name)
    options = {"num_heads": 4, "base_size": case.config.base_size}
    torch.save(reference_weights(case), tmp_path / "a.pth")
    save_file(reference_weights(case), tmp_path / "a.safetensors")
    for file in ("a.pth", "a.safetensors"):
        check_same(load_checkpoint(tmp_path / file, task=case.config.task, **options), case)


def test_mmseg_port(golden: Callable, tmp_path: Path) -> None:
    case = golden("depth_small")
    torch.save(mmseg_port(case), tmp_path / "port.pth")
    model = load_checkpoint(tmp_path / "port.pth", num_heads=4)
    assert model.load_report.format == "mmseg"
    assert model.config.num_scenes == 8
    assert model.load_report.ignored == {"image decoder": ["encoder.encoder_vq.decoder.conv_in.weight"]}
    expected = reference_model(case)
    check_same_outputs(model, expected)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        mean, averaged = model(images, torch.tensor([7]))["pred_d"], expected(images)["pred_d"]
    # The stored mean is a float32 tensor, so it differs from the mean taken here by float32 rounding, held to a tenth
    # of the relative L2 of 1e-4 that float32 results are allowed.
    assert (mean - averaged).norm() <= 1e-5 * averaged.norm()


@pytest.mark.parametrize("name", QUICK)
def test_save_and_load_pretrained(golden: Callable, tmp_path: Path, name: str) -> None:
    case = golden(name)
    model = reference_model(case, latent_scale=0.18215, max_depth=7.0)
    model.save_pretrained(tmp_path / "deep" / "folder")
    assert sorted(p.name for p in (tmp_path / "deep" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    again = VPD.from_pretrained(tmp_path / "deep" / "folder")
    assert again.config == model.config
    check_same_outputs(again, model)
    # The weights alone carry the configuration too.
    alone = load_checkpoint(tmp_path / "deep" / "folder" / "model.safetensors", max_depth=9.0)
    assert alone.config == model.config.replace(max_depth=9.0)
    with pytest.raises(CheckpointError, match="expected a folder"):
        load_pretrained(tmp_path / "deep" / "folder" / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("seg_small", ".ckpt"),
        ("refer_small", ".ckpt"),
        ("refer_small", ".safetensors"),
        ("depth_small", ".safetensors"),
    ],
)
def test_stable_diffusion(golden: Callable, tmp_path: Path, name: str, suffix: str) -> None:
    case = golden(name)
    path = tmp_path / f"sd{suffix}"
    weights = stable_diffusion(case)
    if suffix == ".ckpt":
        torch.save(
            {"state_dict": weights, "callbacks": {argparse.Action: {}}, "pytorch-lightning_version": "1.4"}, path
        )
    else:
        save_file(weights, path)
    options = {} if name == "refer_small" else {"class_embeddings": reference_model(case).class_embeddings}
    model = VPD.from_stable_diffusion(path, case.config, **options)
    reference = reference_model(case).state_dict()
    report = model.load_report
    assert set(report.loaded) | set(report.fresh) == {k for k in reference if not k.endswith("num_batches_tracked")}
    for key, value in model.state_dict().items():
        if key in report.loaded:
            assert torch.equal(value, reference[key]), key
    assert any("text_adapter" in key for key in report.fresh)
    assert not any("unet" in key or "encoder_vq" in key for key in report.fresh)
    ignored = {"diffusion schedule", "image decoder", "moving averages of the UNet", "text encoder"}
    if name != "depth_small":  # the original depth model deletes this part
        ignored.add("noise output of the UNet")
    assert set(report.ignored) == ignored
    assert report.unexpected == []
    assert torch.isfinite(outputs(model)).all()
    with pytest.raises(CheckpointError, match="from_stable_diffusion"):
        load_checkpoint(path)


def test_class_embeddings(golden: Callable, tmp_path: Path) -> None:
    case = golden("seg_small")
    save_file(stable_diffusion(case), tmp_path / "sd.safetensors")
    path, config = tmp_path / "sd.safetensors", case.config
    with pytest.raises(CheckpointError, match=r"missing class embeddings.*\(6, 64\)"):
        load_stable_diffusion(path, config)
    model = load_stable_diffusion(path, config, allow_missing=True)
    assert "class_embeddings" in model.load_report.fresh
    torch.save(torch.ones(6, 64), tmp_path / "embeddings.pth")
    model = load_stable_diffusion(path, config, class_embeddings=tmp_path / "embeddings.pth")
    assert torch.equal(model.class_embeddings, torch.ones(6, 64))
    for wrong in (torch.ones(5, 64), torch.ones(6, 64, dtype=torch.long)):
        with pytest.raises(InputError, match=r"class_embeddings: expected a floating \(6, 64\)"):
            load_stable_diffusion(path, config, class_embeddings=wrong)


def test_stable_diffusion_of_another_size(golden: Callable, tmp_path: Path) -> None:
    save_file(stable_diffusion(golden("seg_small")), tmp_path / "sd.safetensors")
    with pytest.raises(CheckpointError, match="model_channels is 32, expected 320"):
        load_stable_diffusion(tmp_path / "sd.safetensors", VPDConfig(), allow_missing=True)
    partial = {k: v for k, v in stable_diffusion(golden("seg_small")).items() if "middle_block" not in k}
    save_file(partial, tmp_path / "sd.safetensors")
    with pytest.raises(CheckpointError, match=r"not a complete Stable Diffusion 1\.x.*middle_block"):
        load_stable_diffusion(tmp_path / "sd.safetensors", golden("seg_small").config, allow_missing=True)


def test_another_task(golden: Callable, tmp_path: Path) -> None:
    case = golden("depth_small")
    reference_model(case).save_pretrained(tmp_path / "depth")
    with pytest.raises(CheckpointError, match="holds a depth model; expected segmentation"):
        load_checkpoint(tmp_path / "depth", task="segmentation")
    with pytest.raises(InputError, match="task must be one of"):
        load_checkpoint(tmp_path / "depth", task="pose")
    with pytest.raises(InputError, match=r"unknown options \['max_deph'\]"):
        load_checkpoint(tmp_path / "depth", max_deph=3)
    with pytest.raises(CheckpointError, match="is a VPD model"):
        load_stable_diffusion(tmp_path / "depth", case.config)


def test_missing_unexpected_and_misshapen(golden: Callable, tmp_path: Path) -> None:
    case = golden("seg_small")
    path, options = tmp_path / "a.pth", {"num_heads": 4, "base_size": 128}
    weights = reference_weights(case)
    lost = ("decode_head.conv_seg.bias", "text_adapter.fc.2.bias")
    torch.save({k: v for k, v in weights.items() if k not in lost} | {"strange": torch.ones(1), "text": "x"}, path)
    with pytest.raises(CheckpointError, match=r"missing, 2: text_adapter\.fc\.2\.bias, decode_head\.conv_seg\.bias"):
        load_checkpoint(path, **options)
    model = load_checkpoint(path, allow_missing=True, **options)
    assert sorted(model.load_report.missing) == sorted(lost)
    assert model.load_report.unexpected == ["strange", "text"]
    assert torch.isfinite(outputs(model)).all()
    weights["neck.fpn_convs.2.conv.bias"] = torch.ones(31)
    torch.save(weights, path)
    with pytest.raises(CheckpointError, match=r"neck\.fpn_convs\.2\.conv\.bias has shape \(31,\), expected \(32,\)"):
        load_checkpoint(path, allow_missing=True, **options)
    weights["neck.fpn_convs.2.conv.bias"] = torch.ones(32, dtype=torch.long)
    torch.save(weights, path)
    with pytest.raises(CheckpointError, match=r"fpn_convs\.2\.conv\.bias has dtype torch\.int64"):
        load_checkpoint(path, **options)


def test_batch_counters_may_be_missing(golden: Callable, tmp_path: Path) -> None:
    case = golden("seg_small")
    weights = {k: v for k, v in reference_weights(case).items() if not k.endswith("num_batches_tracked")}
    torch.save(weights, tmp_path / "a.pth")
    check_same(load_checkpoint(tmp_path / "a.pth", num_heads=4, base_size=128), case)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(golden: Callable, tmp_path: Path, stored: torch.dtype) -> None:
    case = golden("refer_small")
    path = tmp_path / "a.pth"
    weights = {k: v.to(stored) if v.is_floating_point() else v for k, v in reference_weights(case).items()}
    torch.save({"model": weights}, path)
    model = load_checkpoint(path, num_heads=4)
    assert {v.dtype for v in model.state_dict().values()} == {torch.float32, torch.int64}
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key].to(value.dtype)), key
    assert list(model.load_report.dtypes) == [str(stored).removeprefix("torch.")]
    model = load_checkpoint(path, num_heads=4, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    with pytest.raises(InputError, match="floating dtype"):
        load_checkpoint(path, dtype=torch.int8)


def test_unwritable_targets_leave_nothing_behind(golden: Callable, tmp_path: Path) -> None:
    model = reference_model(golden("depth_small"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"file.*cannot be written"):
        save_pretrained(model, tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_pretrained(model, tmp_path / "file" / "below")
    (tmp_path / "taken" / "config.json").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="is a folder"):
        save_pretrained(model, tmp_path / "taken")
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["config.json"]
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_pretrained(VPD.empty(model.config), tmp_path / "meta")
    assert list((tmp_path / "meta").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"task": "pose"}, "task must be one of"),
        ({"nonsense": 1}, "nonsense is not a setting"),
        ({"latent_scale": math.nan}, "config.json: NaN is no JSON"),
        ({"latent_scale": "x"}, "latent_scale must be a number"),
        ({"num_scenes": 9}, r"class_embeddings has shape \(7, 64\), expected \(9, 64\)"),
        ({"backbone": {"num_res_blocks": 10**9}}, "num_res_blocks must be from 1 to 8"),
        ({"backbone": {"num_res_blocks": 3}}, "num_res_blocks is 2, expected 3"),
        ({"backbone": 3}, "not valid"),
        ({"num_scenes": 2**62}, "num_scenes must be from 1"),
    ],
)
def test_broken_configuration(golden: Callable, tmp_path: Path, change: dict, expected: str) -> None:
    reference_model(golden("depth_small")).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    if isinstance(change.get("backbone"), dict):
        change = {"backbone": {**values["backbone"], **change["backbone"]}}
    (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(CheckpointError, match=expected):
        load_pretrained(tmp_path)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found nothing"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="config.json"):
        load_checkpoint(tmp_path)
    (tmp_path / "unet").mkdir()
    with pytest.raises(CheckpointError, match=r"unet: expected diffusion_pytorch_model\.safetensors"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(tmp_path / "none")


def test_one_network_of_diffusers(tmp_path: Path) -> None:
    save_file({"down_blocks.0.resnets.0.norm1.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="folder that has unet/ and vae/"):
        load_checkpoint(tmp_path / "a.safetensors")
    save_file({"fc.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"neither a VPD model nor Stable Diffusion.*fc\.weight"):
        load_checkpoint(tmp_path / "a.safetensors")


def test_damaged_names_and_sizes(golden: Callable, tmp_path: Path) -> None:
    """Flips in the part of a model file that says what is in it: a model or a CheckpointError."""
    reference_model(golden("depth_small")).save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    header = int.from_bytes(whole[:8], "little")
    torch.save({"model": load_file(tmp_path / "model.safetensors")}, tmp_path / "a.pth")
    pickled = (tmp_path / "a.pth").read_bytes()
    start = pickled.index(b"\x80\x02}")
    parts = ((tmp_path / "b.safetensors", whole, 0, header), (tmp_path / "b.pth", pickled, start, start + 90_000))
    generator = random.Random(1)
    refused = 0
    for path, content, first, last in parts:
        damaged = bytearray(content)
        for _ in range(8):
            at = generator.randrange(first, last)
            damaged[at] = generator.randrange(256)
            path.write_bytes(damaged)
            damaged[at] = content[at]
            try:
                load_checkpoint(path, num_heads=4)
            except CheckpointError:
                refused += 1
    assert refused > 0


def test_what_shapes_do_not_tell_is_noted(tiny_backbone: BackboneConfig, tmp_path: Path) -> None:
    config = VPDConfig(task="depth", num_scenes=2, base_size=128, backbone=tiny_backbone)
    torch.save({"model": VPD(config).state_dict()}, tmp_path / "depth.pth")
    (note,) = load_checkpoint(tmp_path / "depth.pth").load_report.notes
    assert "num_heads=8, base_size=512, max_depth=10.0" in note
    (note,) = load_checkpoint(tmp_path / "depth.pth", num_heads=4, base_size=128).load_report.notes
    assert "assumed, as shapes do not tell: max_depth=10.0" in note
    torch.save({"model": VPD(config).state_dict(), "args": {"max_depth": 10**400}}, tmp_path / "huge.pth")
    assert load_checkpoint(tmp_path / "huge.pth").config.max_depth == 10.0


def test_the_class_decides_the_task(tiny_backbone: BackboneConfig, tmp_path: Path) -> None:
    VPD(VPDConfig(num_classes=2, channels=32, backbone=tiny_backbone)).save_pretrained(tmp_path / "seg")
    with pytest.raises(CheckpointError, match="holds a segmentation model; expected depth"):
        VPDDepth.from_pretrained(tmp_path / "seg")
