"""Models from files as released, as ported, as Stable Diffusion, and from broken or unfitting ones."""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import random
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vpd_fast import VPD, BackboneConfig, VPDConfig
from vpd_fast.checkpoints import (
    convert,
    load_checkpoint,
    load_pretrained,
    load_stable_diffusion,
    read_tensor,
    save_pretrained,
)
from vpd_fast.checkpoints.formats import vpd_to_ldm
from vpd_fast.errors import CheckpointError, InputError
from vpd_fast.models import VPDDepth

CASES = ("seg_small", "refer_small", "depth_small")
NAMES = tuple(f"class {i}" for i in range(6))


@functools.cache
def weights_of(golden: Callable, name: str) -> dict[str, Tensor]:
    case = golden(name)
    return case.state_dict({key: tuple(shape) for key, shape in case.keys.items()})


def reference_weights(case: Any) -> dict[str, Tensor]:
    """Everything the original model's state dict holds, unused parts included."""
    return dict(weights_of(type(case), case.name))


def reference_model(case: Any, **changes: Any) -> VPD:
    """The plain model with these weights."""
    model = VPD(case.config.replace(**changes))
    model.load_state_dict(reference_weights(case))
    return model.eval()


def released(case: Any) -> dict[str, Any]:
    """The containers of the original training code."""
    weights = OrderedDict(reference_weights(case))
    if case.settings["task"] == "segmentation":
        meta = {"mmcv_version": "1.6.2", "CLASSES": NAMES, "PALETTE": [[0, 0, 0]] * 6, "config": "norm_cfg = 1"}
        return {"meta": meta, "state_dict": weights, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}
    arguments = argparse.Namespace(max_depth=8.0, model="vpd")
    if case.settings["task"] == "depth":
        weights = OrderedDict((f"module.{key}", value) for key, value in weights.items())
    return {"model": weights, "optimizer": {}, "epoch": 3, "args": arguments, "lr_scheduler": {"last_epoch": 3}}


def mmseg_port(case: Any) -> dict[str, Any]:
    """The depth model as mmsegmentation 1.x saves it: 28 embeddings, the image decoder still there."""
    table = (
        ("encoder.layer1.", "decode_head.conv1."),
        ("encoder.layer2.0.", "decode_head.conv2."),
        ("encoder.out_layer.", "decode_head.conv_aggregation."),
        ("encoder.", "backbone."),
        ("decoder.", "decode_head.decoder."),
        ("last_layer_depth.", "decode_head.depth_pred_layer."),
    )
    weights = {}
    for key, value in reference_weights(case).items():
        ours, theirs = next(pair for pair in table if key.startswith(pair[0]))
        weights[theirs + key[len(ours) :]] = value
    embeddings = weights["backbone.class_embeddings"]
    weights["backbone.class_embeddings"] = torch.cat([embeddings, embeddings.mean(0, keepdim=True)])
    weights["backbone.encoder_vq.decoder.conv_in.weight"] = torch.ones(4, 4, 3, 3)
    meta = {"dataset_meta": {"classes": ("a", "b")}, "seed": 1}
    return {"meta": meta, "state_dict": weights, "message_hub": {"log_scalars": argparse.Namespace()}}


def stable_diffusion(case: Any) -> dict[str, Tensor]:
    """ldm's names: the UNet and encoder of the case, and parts that VPD leaves out."""
    weights = vpd_to_ldm(reference_weights(case))
    weights["first_stage_model.decoder.conv_in.weight"] = torch.ones(32, 4, 3, 3)
    weights["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"] = torch.ones(9, 64)
    weights["model_ema.diffusion_modelout0weight"] = torch.ones(32)
    weights |= {"betas": torch.ones(10), "sqrt_recip_alphas_cumprod": torch.ones(10), "model_ema.decay": torch.ones(())}
    return weights


def outputs(model: VPD) -> Tensor:
    """The model's answer for a small picture, in float64: equal weights leave rounding of 1e-16 an operation."""
    model = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(1, 3, 64, 64, generator=generator).double()
    with torch.no_grad():
        if model.config.task == "depth":
            return model(images, torch.tensor([3]))["pred_d"]
        tokens = torch.randn(1, model.config.tokens, model.config.backbone.context_dim, generator=generator).double()
        return model(images, tokens) if model.config.task == "referring" else model(images)


def check_same_outputs(model: VPD, expected: VPD) -> None:
    # Not bit by bit: libraries choose loops by the alignment of the weights, and that of a mapped file is arbitrary.
    # In float64 a few thousand roundings of 1e-16 stay below 1e-12; a wrong weight does not stay below 1e-9.
    torch.testing.assert_close(outputs(model), outputs(expected), rtol=1e-9, atol=1e-9)


def check_same(model: VPD, case: Any) -> None:
    assert model.config.task == case.settings["task"]
    assert not model.training
    expected = reference_model(case, max_depth=model.config.max_depth)
    weights = model.state_dict()
    assert list(weights) == list(expected.state_dict())
    for key, value in expected.state_dict().items():
        assert torch.equal(weights[key], value), key
    check_same_outputs(model, expected)
    requires = {name: p.requires_grad for name, p in expected.named_parameters()}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == requires


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", CASES)
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


@pytest.mark.parametrize("name", CASES)
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


@pytest.mark.parametrize("name", CASES)
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


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("name", CASES)
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
        for _ in range(12):
            at = generator.randrange(first, last)
            damaged[at] = generator.randrange(256)
            path.write_bytes(damaged)
            damaged[at] = content[at]
            try:
                load_checkpoint(path, num_heads=4)
            except CheckpointError:
                refused += 1
    assert refused > 0


def test_what_shapes_do_not_tell_is_noted(small_backbone: BackboneConfig, tmp_path: Path) -> None:
    config = VPDConfig(task="depth", num_scenes=2, base_size=128, backbone=small_backbone)
    torch.save({"model": VPD(config).state_dict()}, tmp_path / "depth.pth")
    (note,) = load_checkpoint(tmp_path / "depth.pth").load_report.notes
    assert "num_heads=8, base_size=512, max_depth=10.0" in note
    (note,) = load_checkpoint(tmp_path / "depth.pth", num_heads=4, base_size=128).load_report.notes
    assert "assumed, as shapes do not tell: max_depth=10.0" in note
    torch.save({"model": VPD(config).state_dict(), "args": {"max_depth": 10**400}}, tmp_path / "huge.pth")
    assert load_checkpoint(tmp_path / "huge.pth").config.max_depth == 10.0


def test_the_class_decides_the_task(small_backbone: BackboneConfig, tmp_path: Path) -> None:
    VPD(VPDConfig(num_classes=2, channels=32, backbone=small_backbone)).save_pretrained(tmp_path / "seg")
    with pytest.raises(CheckpointError, match="holds a segmentation model; expected depth"):
        VPDDepth.from_pretrained(tmp_path / "seg")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "own"])
def test_saving_over_the_file_that_is_loaded_by_other_means(golden: Callable, tmp_path: Path, name: str) -> None:
    """torch.save and safetensors cut the file first: a model that still lay in it would end the process."""
    program = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from vpd_fast import VPD
path = Path(sys.argv[1])
model = VPD.from_checkpoint(path, num_heads=4, base_size=128)
path = path / "model.safetensors" if path.is_dir() else path
with torch.no_grad():
    model.decode_head.conv_seg.bias += 1
if path.suffix == ".pth":
    torch.save({"model": model.state_dict()}, path)
else:
    save_file(model.state_dict(), path)
"""
    model = reference_model(golden("seg_small"))
    path = tmp_path / name
    model.save_pretrained(tmp_path / "own")
    if name == "a.pth":
        torch.save({"model": model.state_dict()}, path)
    elif name == "a.safetensors":
        save_file(model.state_dict(), path)
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
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


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(golden: Callable, tmp_path: Path, kind: str, value: float) -> None:
    weights = dict(reference_weights(golden("depth_small")))
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


def test_weights_too_large_for_a_dtype(golden: Callable, tmp_path: Path) -> None:
    weights = dict(reference_weights(golden("depth_small")))
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
