"""Names and shapes of Stable Diffusion in both conventions; checked against diffusers itself where it is installed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vpd_fast import VPD, BackboneConfig, VPDConfig
from vpd_fast.checkpoints import convert, ldm_diffusers
from vpd_fast.checkpoints.convert import unet_config, vae_config
from vpd_fast.checkpoints.ldm_diffusers import Layout
from vpd_fast.errors import CheckpointError
from vpd_fast.models.random_weights import randomize

LAYOUTS = [
    Layout(),
    Layout(blocks=1, vae_blocks=3),
    Layout(attention=frozenset({0, 2})),
    Layout(attention=frozenset({0, 1, 2, 3})),
]


def reference_names(golden: Callable, prefix: str) -> dict[str, Tensor]:
    """Meta tensors of the original SD-1.5 network below `prefix`."""
    keys = golden("seg_sd15").keys
    return {k[len(prefix) :]: torch.empty(s, device="meta") for k, s in keys.items() if k.startswith(prefix)}


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in tensors.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_are_one_to_one(layout: Layout) -> None:
    for table in (ldm_diffusers.unet_modules(layout), ldm_diffusers.vae_modules(layout)):
        assert len(set(table.values())) == len(table)
    unet, vae = (ldm_diffusers.unet_modules(layout).values(), ldm_diffusers.vae_modules(layout).values())
    assert Layout.of_diffusers([f"{m}.weight" for m in unet], [f"{m}.weight" for m in vae]) == layout


def test_round_trip_of_sd15(golden: Callable) -> None:
    unet = reference_names(golden, "unet.unet.diffusion_model.")
    assert len(unet) == 686
    there = ldm_diffusers.unet_to_diffusers(unet, Layout())
    assert len(there) == 686
    assert shapes(ldm_diffusers.unet_from_diffusers(there, Layout())) == shapes(unet)
    vae = reference_names(golden, "encoder_vq.")
    there = ldm_diffusers.vae_to_diffusers(vae, Layout())
    assert there["encoder.mid_block.attentions.0.to_q.weight"].shape == (512, 512)
    assert shapes(ldm_diffusers.vae_from_diffusers(there, Layout())) == shapes(vae)


def test_old_attention_names_and_matrix_projections() -> None:
    matrix = torch.arange(16.0).reshape(4, 4)
    old = {f"encoder.mid_block.attentions.0.{n}.weight": matrix + i for i, n in enumerate(("query", "proj_attn"))}
    found = ldm_diffusers.vae_from_diffusers(old, Layout())
    assert torch.equal(found["encoder.mid.attn_1.q.weight"][..., 0, 0], matrix)
    assert torch.equal(found["encoder.mid.attn_1.proj_out.weight"][..., 0, 0], matrix + 1)
    linear = {"down_blocks.0.attentions.0.proj_in.weight": matrix}
    assert ldm_diffusers.unet_from_diffusers(linear, Layout())["input_blocks.1.1.proj_in.weight"].shape == (4, 4, 1, 1)


def test_foreign_names() -> None:
    with pytest.raises(CheckpointError, match=r"'add_embedding\.linear_1\.weight' is not a weight"):
        ldm_diffusers.unet_from_diffusers({"add_embedding.linear_1.weight": torch.zeros(1)}, Layout())


def diffusers_models(backbone: BackboneConfig) -> tuple:
    diffusers = pytest.importorskip("diffusers")
    unet, vae = unet_config(backbone), vae_config(backbone)
    return diffusers.UNet2DConditionModel.from_config(unet), diffusers.AutoencoderKL.from_config(vae)


def test_names_and_shapes_are_those_of_diffusers(golden: Callable) -> None:
    with torch.device("meta"):
        unet, vae = diffusers_models(BackboneConfig())
    found = ldm_diffusers.unet_to_diffusers(reference_names(golden, "unet.unet.diffusion_model."), Layout())
    assert shapes(found) == shapes(unet.state_dict())
    expected = shapes(vae.state_dict())
    found = ldm_diffusers.vae_to_diffusers(reference_names(golden, "encoder_vq."), Layout())
    assert shapes(found) == {k: v for k, v in expected.items() if not k.startswith("decoder.")}
    whole = ldm_diffusers.vae_from_diffusers(vae.state_dict(), Layout())
    assert shapes(ldm_diffusers.vae_to_diffusers(whole, Layout())) == expected
    # The decoder's names in the original code: spot checks.
    assert whole["decoder.up.0.block.0.nin_shortcut.weight"].shape == (128, 256, 1, 1)
    assert whole["decoder.up.3.upsample.conv.weight"].shape == (512, 512, 3, 3)
    assert whole["decoder.mid.attn_1.proj_out.weight"].shape == (512, 512, 1, 1)


def test_diffusers_computes_the_same(small_backbone: BackboneConfig, tmp_path: Path) -> None:
    """Our folder loaded by diffusers gives our latents, and the UNet the activations of ours."""
    diffusers = pytest.importorskip("diffusers")
    model = randomize(VPD(VPDConfig(task="referring", tokens=6, base_size=128, backbone=small_backbone)), 5).eval()
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to="diffusers")
    unet = diffusers.UNet2DConditionModel.from_pretrained(
        tmp_path / "theirs", subfolder="unet", low_cpu_mem_usage=False
    )
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "theirs", subfolder="vae", low_cpu_mem_usage=False)
    for network in (model, unet, vae):
        network.double()  # leaves rounding of 1e-16 an operation, so a wrong weight cannot hide
    images, tokens = torch.randn(1, 3, 128, 128).clamp(-1, 1).double(), torch.randn(1, 6, 64).double()
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
        # In float64 a few thousand roundings of 1e-16 stay below 1e-12; a wrong weight does not stay below 1e-9.
        assert torch.allclose(latents, model.encode(images), rtol=1e-9, atol=1e-9)
        outputs = []
        unet.conv_norm_out.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
        unet(latents, torch.ones(1, dtype=torch.long), encoder_hidden_states=tokens)
        ours = model.features(latents, tokens)[0]
    # Both compute the time embedding in float32, with roundings of their own: 6e-8 each, through some 100 layers.
    assert (outputs[0] - ours).norm() <= 1e-5 * ours.norm()


def test_loads_what_diffusers_writes(small_backbone: BackboneConfig, tmp_path: Path) -> None:
    unet, vae = diffusers_models(small_backbone)
    unet.save_pretrained(tmp_path / "sd" / "unet", max_shard_size="1MB")
    vae.save_pretrained(tmp_path / "sd" / "vae")
    assert list((tmp_path / "sd" / "unet").glob("*.index.json"))
    config = VPDConfig(task="referring", tokens=6, base_size=128, backbone=small_backbone)
    model = VPD.from_stable_diffusion(tmp_path / "sd", config).eval()
    images = torch.randn(1, 3, 64, 64).clamp(-1, 1).double()
    with torch.no_grad():
        expected = copy.deepcopy(vae).double().encode(images).latent_dist.mean
        # float64, as above.
        assert torch.allclose(expected, copy.deepcopy(model).double().encode(images), rtol=1e-9, atol=1e-9)
    convert(tmp_path / "sd", tmp_path / "sd.ckpt", to="ldm")
    convert(tmp_path / "sd.ckpt", tmp_path / "again", to="diffusers")
    for part, original in (("unet", unet), ("vae", vae)):
        again = type(original).from_pretrained(tmp_path / "again", subfolder=part, low_cpu_mem_usage=False)
        for key, value in original.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key
