"""Conversions between all formats keep every tensor that the target can hold, and say which it cannot."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vpd_fast import VPD, BackboneConfig, VPDConfig
from vpd_fast.checkpoints import convert, ldm_diffusers, load_checkpoint, load_stable_diffusion
from vpd_fast.checkpoints.formats import vpd_to_ldm
from vpd_fast.errors import CheckpointError, InputError
from vpd_fast.models.random_weights import randomize
from vpd_fast.tasks import TASKS


@functools.cache
def weights_of(golden: Callable, name: str) -> dict[str, Tensor]:
    """Everything the original model's state dict holds."""
    case = golden(name)
    return case.state_dict({key: tuple(shape) for key, shape in case.keys.items()})


def reference_model(golden: Callable, name: str, **changes: Any) -> VPD:
    """The plain model with these weights."""
    model = VPD.empty(golden(name).config.replace(**changes))
    model.load_state_dict({key: x.clone() for key, x in weights_of(golden, name).items()}, assign=True)
    return model.eval()


def whole_stable_diffusion(golden: Callable) -> dict[str, Tensor]:
    """ldm's names, complete: noise output, image decoder, text encoder."""
    weights = vpd_to_ldm(weights_of(golden, "seg_small"))
    for module in ldm_diffusers.vae_modules(ldm_diffusers.Layout()):
        if module.startswith("decoder."):
            matrix = ".attn_1." in module and ".norm" not in module
            weights[f"first_stage_model.{module}.weight"] = torch.randn(8, 8, 1, 1) if matrix else torch.randn(8)
    text = "cond_stage_model.transformer.text_model."
    weights |= {
        f"{text}embeddings.token_embedding.weight": torch.randn(9, 64),
        f"{text}embeddings.position_embedding.weight": torch.randn(7, 64),
        f"{text}encoder.layers.0.mlp.fc1.weight": torch.randn(128, 64),
    }
    return weights


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("task", TASKS)
def test_vpd_to_everything_and_back(tiny_backbone: BackboneConfig, tmp_path: Path, task: str) -> None:
    config = VPDConfig(task=task, num_classes=6, tokens=10, num_scenes=7, channels=32, backbone=tiny_backbone)
    model = randomize(VPD.empty(config.replace(latent_scale=0.5, base_size=128)), 1).eval()
    state = model.state_dict()
    model.save_pretrained(tmp_path / "first")
    chain = [("vpd", "a.pth"), ("vpd", "a.safetensors"), ("pretrained", "again"), ("vpd", "b.ckpt")]
    source = tmp_path / "first"
    for to, target in chain:
        report = convert(source, tmp_path / target, to=to)
        assert (len(report.written), report.dropped, report.lacking) == (len(state), {}, [])
        source = tmp_path / target
        loaded = load_checkpoint(source)
        assert loaded.config == model.config
        check_equal(loaded.state_dict(), state)
    for to, target in (("ldm", "sd.safetensors"), ("ldm", "sd.ckpt"), ("diffusers", "sd")):
        report = convert(source, tmp_path / target, to=to)
        assert any("image decoder" in line for line in report.lacking)
        assert any("noise output" in line for line in report.lacking)
        assert "left out" in str(report)
        options = {} if task == "referring" else {"class_embeddings": model.class_embeddings}
        again = load_stable_diffusion(tmp_path / target, config, **options).state_dict()
        check_equal({k: again[k] for k in state if "unet" in k}, {k: v for k, v in state.items() if "unet" in k})
        check_equal({k: again[k] for k in state if "_vq" in k}, {k: v for k, v in state.items() if "_vq" in k})


def test_released_layout(golden: Callable, tmp_path: Path) -> None:
    """What other programs look for in a written file, read with torch alone."""
    reference_model(golden, "seg_small", class_names=tuple("abcdef")).save_pretrained(tmp_path / "seg")
    convert(tmp_path / "seg", tmp_path / "seg.pth", to="vpd")
    content = torch.load(tmp_path / "seg.pth", weights_only=True)
    assert content["meta"]["CLASSES"] == tuple("abcdef")
    check_equal(content["state_dict"], reference_model(golden, "seg_small").state_dict())
    reference_model(golden, "depth_small").save_pretrained(tmp_path / "depth")
    convert(tmp_path / "depth", tmp_path / "depth.pth", to="vpd")
    content = torch.load(tmp_path / "depth.pth", weights_only=True)
    check_equal(content["model"], reference_model(golden, "depth_small").state_dict())
    # Memory-mapped sources are written tensor by tensor, not as whole files.
    assert (tmp_path / "depth.pth").stat().st_size < 1.2 * (tmp_path / "depth" / "model.safetensors").stat().st_size


def test_stable_diffusion_there_and_back(golden: Callable, tmp_path: Path) -> None:
    weights = whole_stable_diffusion(golden)
    save_file({**weights, "betas": torch.ones(3), "model_ema.decay": torch.ones(1)}, tmp_path / "sd.safetensors")
    report = convert(tmp_path / "sd.safetensors", tmp_path / "folder", to="diffusers")
    assert report.dropped == {"diffusion schedule": ["betas"], "moving averages of the UNet": ["model_ema.decay"]}
    assert len(report.lacking) == 1
    assert len(report.written) == len(weights)
    files = sorted(str(p.relative_to(tmp_path / "folder")) for p in (tmp_path / "folder").rglob("*") if p.is_file())
    assert files == [
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    attention = load_file(tmp_path / "folder/vae/diffusion_pytorch_model.safetensors")
    assert attention["encoder.mid_block.attentions.0.to_q.weight"].dim() == 2
    for target in ("back.ckpt", "back.safetensors"):
        convert(tmp_path / "folder", tmp_path / target, to="ldm")
    check_equal(load_file(tmp_path / "back.safetensors"), weights)
    check_equal(torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"], weights)


def test_variants_and_shards(golden: Callable, tmp_path: Path) -> None:
    """The file names found in diffusers folders: .bin, .fp16, an index of shards."""
    save_file(whole_stable_diffusion(golden), tmp_path / "sd.safetensors")
    convert(tmp_path / "sd.safetensors", tmp_path / "sd", to="diffusers")
    expected = load_file(tmp_path / "sd.safetensors")
    unet, vae, text = (tmp_path / "sd" / part for part in ("unet", "vae", "text_encoder"))
    tensors = load_file(unet / "diffusion_pytorch_model.safetensors")
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"one.safetensors": names[:300], "two.safetensors": names[300:]}
    for shard, members in shards.items():
        save_file({key: tensors[key] for key in members}, unet / shard)
    index = {"weight_map": {key: shard for shard, members in shards.items() for key in members}}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    (vae / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(weights, vae / "diffusion_pytorch_model.bin")
    save_file({key: value.half() for key, value in weights.items()}, vae / "diffusion_pytorch_model.fp16.safetensors")
    weights = load_file(text / "model.safetensors")
    (text / "model.safetensors").unlink()
    torch.save({key.removeprefix("text_model."): value for key, value in weights.items()}, text / "pytorch_model.bin")
    convert(tmp_path / "sd", tmp_path / "back.safetensors", to="ldm")
    check_equal(load_file(tmp_path / "back.safetensors"), expected)
    (vae / "diffusion_pytorch_model.bin").unlink()
    convert(tmp_path / "sd", tmp_path / "half.safetensors", to="ldm")
    half = load_file(tmp_path / "half.safetensors")
    assert half["first_stage_model.quant_conv.weight"].dtype == torch.float16
    (unet / "one.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"one\.safetensors: no such file"):
        convert(tmp_path / "sd", tmp_path / "half.safetensors", to="ldm")


def test_text_encoder_is_what_transformers_reads(
    tiny_backbone: BackboneConfig, golden: Callable, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=90, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, projection_dim=128, bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    clip = transformers.CLIPTextModel(config).eval()
    weights = {k: v for k, v in whole_stable_diffusion(golden).items() if "cond_stage" not in k}
    for key, value in clip.state_dict().items():
        weights[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    save_file(weights, tmp_path / "sd.safetensors")
    convert(tmp_path / "sd.safetensors", tmp_path / "sd", to="diffusers")
    again = transformers.CLIPTextModel.from_pretrained(tmp_path / "sd", subfolder="text_encoder").eval()
    ids = torch.tensor([[0, 5, 7, 2]])
    with torch.no_grad():
        assert torch.equal(again(ids).last_hidden_state, clip(ids).last_hidden_state)


def test_dtype(golden: Callable, tmp_path: Path) -> None:
    reference_model(golden, "depth_small").save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "half", to="pretrained", dtype=torch.float16)
    kinds = {value.dtype for value in load_file(tmp_path / "half" / "model.safetensors").values()}
    assert kinds == {torch.float16, torch.int64}
    assert load_checkpoint(tmp_path / "half").dtype == torch.float32


def test_impossible_conversions(golden: Callable, tmp_path: Path) -> None:
    save_file(whole_stable_diffusion(golden), tmp_path / "sd.safetensors")
    for to in ("pretrained", "vpd"):
        with pytest.raises(CheckpointError, match="without a VPD head"):
            convert(tmp_path / "sd.safetensors", tmp_path / "out", to=to)
    with pytest.raises(InputError, match="to must be one of"):
        convert(tmp_path / "sd.safetensors", tmp_path / "out", to="onnx")
    with pytest.raises(CheckpointError, match="cannot be written"):
        convert(tmp_path / "sd.safetensors", tmp_path / "sd.safetensors" / "out", to="diffusers")
    with pytest.raises(CheckpointError, match="is a folder"):
        convert(tmp_path / "sd.safetensors", tmp_path, to="ldm")
    assert [p.name for p in tmp_path.iterdir()] == ["sd.safetensors"]
    model = randomize(VPD(VPDConfig(task="referring", tokens=5, backbone=golden("seg_small").config.backbone)))
    state = {key: value for key, value in model.state_dict().items() if key != "classifier.conv1_1.bias"}
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match=r"missing, 1: classifier\.conv1_1\.bias"):
        convert(tmp_path / "part.pth", tmp_path / "out", to="pretrained", num_heads=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["part.pth", "sd.safetensors"]


def test_in_place(golden: Callable, tmp_path: Path) -> None:
    model = reference_model(golden, "depth_small")
    model.save_pretrained(tmp_path)
    convert(tmp_path, tmp_path, to="pretrained", max_depth=80.0)
    again = load_checkpoint(tmp_path)
    assert again.config.max_depth == 80.0
    check_equal(again.state_dict(), model.state_dict())
