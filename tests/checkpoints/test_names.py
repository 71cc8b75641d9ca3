"""Names of weights as wrappers, frameworks and averages leave them in files."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vpd_fast import VPD, VPDConfig
from vpd_fast.checkpoints import convert, load_checkpoint, load_pretrained, load_stable_diffusion, open_checkpoint
from vpd_fast.checkpoints.formats import vpd_to_ldm
from vpd_fast.checkpoints.names import WRAPPER_PARTS, without_wrappers
from vpd_fast.checkpoints.reader import read_file
from vpd_fast.checkpoints.state_dicts import find_state_dict
from vpd_fast.errors import CheckpointError
from vpd_fast.models.random_weights import randomize

from ..helpers.backbones import LEAST

HEAD = "decode_head.conv_seg.weight"


@functools.cache
def model() -> VPD:
    return randomize(VPD.empty(VPDConfig(num_classes=2, base_size=128, channels=32, backbone=LEAST)), 0).eval()


def state() -> dict[str, Tensor]:
    return dict(model().state_dict())


def shifted() -> dict[str, Tensor]:
    """Other weights, as averages are."""
    return {key: value + 1 if value.is_floating_point() else value for key, value in state().items()}


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in tensors.items()}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def head_of(path: Path, **options: Any) -> Tensor:
    loaded = load_checkpoint(path, num_heads=4, base_size=128, **options)
    assert loaded.load_report.missing == []
    return loaded.state_dict()[HEAD]


@pytest.mark.parametrize("part", sorted(WRAPPER_PARTS))
def test_wrappers_anywhere_in_a_name(part: str) -> None:
    keys = [f"{part}.unet.x.weight", f"unet.{part}.y.weight", f"unet.z.{part}.weight", f"{part}.{part}.w"]
    assert list(without_wrappers(dict.fromkeys(keys))) == ["unet.x.weight", "unet.y.weight", "unet.z.weight", "w"]
    assert list(without_wrappers({"text_module.modules.weight": 0})) == ["text_module.modules.weight"]


def test_wrappers_around_parts_of_a_model(tmp_path: Path) -> None:
    renamed = {
        key.replace("unet.", "unet._orig_mod.", 1).replace("decode_head.", "decode_head.module.", 1): value
        for key, value in state().items()
    }
    for root in ("", "model.", "net._orig_mod."):
        path = saved(tmp_path / "a.ckpt", {"state_dict": prefixed(root, renamed), "pytorch-lightning_version": "2"})
        assert torch.equal(head_of(path), state()[HEAD])
    save_file(renamed, tmp_path / "a.safetensors")
    assert torch.equal(head_of(tmp_path / "a.safetensors"), state()[HEAD])


def test_two_weights_that_become_one_are_an_error(tmp_path: Path) -> None:
    for extra in (f"_orig_mod.{HEAD}", "decode_head.module.conv_seg.weight"):
        path = saved(tmp_path / "a.pth", {**state(), extra: torch.zeros(1)})
        with pytest.raises(CheckpointError, match=rf"a\.pth: two weights have the same name.*{HEAD} and {extra}"):
            load_checkpoint(path)
    path = saved(tmp_path / "a.pth", {**prefixed("model.", state()), "decode_head.conv_seg.bias": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"two weights have the same name without 'model\.'"):
        load_checkpoint(path)


def test_what_save_pretrained_writes_has_clean_names(tmp_path: Path) -> None:
    wrapped = randomize(VPD.empty(model().config), 0)
    wrapped.decode_head = torch.nn.Sequential()
    wrapped.decode_head.add_module("_orig_mod", randomize(VPD.empty(model().config), 0).decode_head)  # as compiled
    wrapped.save_pretrained(tmp_path)
    assert read_file(tmp_path / "model.safetensors").tensors.keys() == state().keys()
    assert torch.equal(load_pretrained(tmp_path).state_dict()[HEAD], state()[HEAD])


@pytest.mark.parametrize(
    "names",
    [
        (name,) for name in ("state_dict", "model", "model_state_dict", "module", "net", "params", "ema", "generator")
    ] + [("model", "state_dict"), ("state_dict", "model"), ("state", "model", "module"), ("ema", "module")],
)  # fmt: skip
def test_containers(names: tuple[str, ...]) -> None:
    content: Any = {"a": torch.ones(1)}
    for name in reversed(names):
        content = {name: content, "step": 3, "count": torch.ones(1), "optimizer": {"state": {0: {"x": torch.ones(1)}}}}
    if names == ("generator",):
        del content["count"]  # a name that nobody knows, and nothing else that it could be
    found, metadata, averaged = find_state_dict(content)
    assert (list(found), averaged) == (["a"], False)
    assert metadata["step"] == 3


def test_several_containers_of_unknown_names() -> None:
    content = {"student": {"a": torch.ones(1)}, "teacher": {"a": torch.ones(1)}}
    with pytest.raises(CheckpointError, match=r"several state dicts \(student, teacher\)"):
        find_state_dict(content)
    shared: dict = {"epoch": 1}
    for _ in range(20):
        shared = dict.fromkeys(("model", "state_dict", "net", "params", "ema"), shared)
    with pytest.raises(CheckpointError, match="no tensors"):  # and not after 5**20 steps
        find_state_dict(shared)


@pytest.mark.parametrize(
    "content",
    [
        lambda: {"model": state(), "ema": shifted()},
        lambda: {"model": state(), "model_ema": {"module": shifted(), "decay": 0.9}},
        lambda: {"state_dict": state(), "state_dict_ema": prefixed("module.", shifted())},
        lambda: {"state_dict": prefixed("model.", state()) | prefixed("ema_model.module.", shifted())},
        lambda: {**state(), **prefixed("ema.", shifted()), "ema.n_averaged": torch.tensor(3)},
    ],
)
def test_averages_beside_the_weights(tmp_path: Path, content: Any) -> None:
    path = saved(tmp_path / "a.pth", content())
    assert torch.equal(head_of(path), state()[HEAD])
    assert torch.equal(head_of(path, ema=True), shifted()[HEAD])
    convert(path, tmp_path / "b", to="pretrained", ema=True, num_heads=4, base_size=128)
    assert torch.equal(load_pretrained(tmp_path / "b").state_dict()[HEAD], shifted()[HEAD])


def test_averages_alone_and_none(tmp_path: Path) -> None:
    averaged = {**prefixed("module.", state()), "n_averaged": torch.tensor(3)}
    loaded = load_checkpoint(saved(tmp_path / "a.pth", averaged), num_heads=4, base_size=128)
    assert loaded.load_report.ignored == {"number of averaged steps": ["n_averaged"]}
    assert torch.equal(head_of(saved(tmp_path / "a.pth", {"params_ema": state()})), state()[HEAD])
    for content in (state(), {"model": state()}):
        with pytest.raises(CheckpointError, match=r"no averages of the weights \(EMA\)"):
            load_checkpoint(saved(tmp_path / "a.pth", content), ema=True)
    for name in ("shapes-segmentation", str(tmp_path / "own")):
        model().save_pretrained(tmp_path / "own")
        with pytest.raises(CheckpointError, match="no averages"):
            load_checkpoint(name, ema=True)
    two = prefixed("a.", state()) | prefixed("b.", state())
    with pytest.raises(CheckpointError, match=r"several models \(a, b\)"):
        load_checkpoint(saved(tmp_path / "a.pth", two))


def test_mmengine_puts_averages_in_the_place_of_the_weights(tmp_path: Path) -> None:
    content = {
        "meta": {"mmengine_version": "0.10"},
        "state_dict": shifted(),
        "ema_state_dict": prefixed("module.", state()),
    }
    path = saved(tmp_path / "a.pth", content)
    assert torch.equal(head_of(path), shifted()[HEAD])
    assert torch.equal(head_of(path, ema=True), shifted()[HEAD])


def ldm() -> dict[str, Tensor]:
    return vpd_to_ldm(state())


def test_averages_of_stable_diffusion(tmp_path: Path) -> None:
    key = "model.diffusion_model.input_blocks.0.0.weight"
    shadow = {
        "model_ema." + k.removeprefix("model.").replace(".", ""): v + 1 for k, v in ldm().items() if "diffusion" in k
    }
    path = saved(tmp_path / "sd.ckpt", {"state_dict": {**ldm(), **shadow, "model_ema.decay": torch.ones(())}})
    assert torch.equal(open_checkpoint(path).tensors[key], ldm()[key])
    assert torch.equal(open_checkpoint(path, ema=True).tensors[key], ldm()[key] + 1)
    path = saved(tmp_path / "sd.ckpt", prefixed("pipe.", ldm()))
    assert torch.equal(open_checkpoint(path).tensors[key], ldm()[key])


def test_missing_vae_is_named(tmp_path: Path) -> None:
    unet = {key: value for key, value in ldm().items() if key.startswith("model.")}
    with pytest.raises(CheckpointError, match=r"no VAE \(first_stage_model"):
        load_stable_diffusion(saved(tmp_path / "sd.ckpt", unet), model().config, class_embeddings=torch.ones(2, 32))
    vae = {key.removeprefix("first_stage_model."): value for key, value in ldm().items() if "first_stage" in key}
    vae["decoder.conv_in.weight"] = torch.ones(1)
    with pytest.raises(CheckpointError, match="a VAE alone"):
        open_checkpoint(saved(tmp_path / "vae.ckpt", vae))
    (tmp_path / "folder" / "unet").mkdir(parents=True)
    save_file(unet, tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="no vae/, the VAE"):
        open_checkpoint(tmp_path / "folder")


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        ({"attention_head_dim": 4}, 4),
        ({"attention_head_dim": None, "num_attention_heads": 4}, 4),
        ({"attention_head_dim": 8, "num_attention_heads": 4}, 4),
        ({"attention_head_dim": [4, 4, 4, 4]}, 4),
        ({"attention_head_dim": None}, 8),
        ({"attention_head_dim": [5, 10]}, None),
        ({"attention_head_dim": "4"}, None),
        ({"attention_head_dim": True}, None),
    ],
)
def test_heads_and_variants_of_diffusers_folders(tmp_path: Path, heads: dict, expected: int | None) -> None:
    convert(saved(tmp_path / "sd.ckpt", ldm()), tmp_path / "sd", to="diffusers", num_heads=4)
    for part, variant in (("unet", "fp16"), ("vae", "bf16")):
        weights = tmp_path / "sd" / part / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_name(f"diffusion_pytorch_model.{variant}.safetensors"))
    config = tmp_path / "sd" / "unet" / "config.json"
    values = {key: value for key, value in json.loads(config.read_text()).items() if "attention_head" not in key}
    config.write_text(json.dumps({**values, **heads}))
    if expected is None:
        with pytest.raises(CheckpointError, match="attention_head_dim is .* expected one int"):
            open_checkpoint(tmp_path / "sd")
    else:
        assert open_checkpoint(tmp_path / "sd").metadata["num_heads"] == expected
    with pytest.raises(CheckpointError, match="unet_ema/"):
        open_checkpoint(tmp_path / "sd", ema=True)


@pytest.mark.parametrize(
    "content",
    [
        lambda: {**state(), "unet.unet.diffusion_model.input_blocks.99999999999.0.weight": torch.ones(1)},
        lambda: {**state(), "unet.unet.diffusion_model.input_blocks.0.0.weight": torch.ones(0, 4, 3, 3)},
        lambda: {**state(), "unet.unet.diffusion_model.input_blocks.0.0.weight": torch.ones(5)},
        lambda: {**state(), "neck.lateral_convs.0.conv.weight": torch.ones(())},
    ],
)
def test_names_and_shapes_of_no_network(tmp_path: Path, content: Any) -> None:
    with pytest.raises(CheckpointError, match="model|Stable Diffusion"):
        load_checkpoint(saved(tmp_path / "a.pth", content()))


def test_numbers_in_names_of_diffusers(tmp_path: Path) -> None:
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        key = f"{'encoder.' * (part == 'vae')}down_blocks.0.resnets.999999999.norm1.weight"
        save_file({key: torch.ones(1)}, tmp_path / part / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="have the number '999999999'"):
        open_checkpoint(tmp_path)


def test_counters_have_their_dtype(tmp_path: Path) -> None:
    key = next(key for key in state() if key.endswith("num_batches_tracked"))
    path = saved(tmp_path / "a.pth", {**state(), key: torch.tensor(3, dtype=torch.uint16)})
    counter = load_checkpoint(path, num_heads=4, base_size=128).state_dict()[key]
    assert (counter.dtype, int(counter)) == (torch.int64, 3)
