"""The frozen encoder of training against the model's own."""

from __future__ import annotations

import pytest
import torch

from vpd_fast import VPD, VPDConfig
from vpd_fast.errors import InputError
from vpd_fast.models.random_weights import randomize
from vpd_fast.training.frozen import FrozenEncoder


@pytest.fixture
def model(tiny_backbone) -> VPD:
    config = VPDConfig(num_classes=5, channels=32, base_size=64, latent_scale=0.5, backbone=tiny_backbone)
    return randomize(VPD.empty(config), 1).train()


# The gates of the engine's own tests: relative L2 in float32, cosines of what is rounded.
@pytest.mark.parametrize(
    ("precision", "cosine"), [("plain", 1.0), ("fp32", 0.99999999), ("bf16", 0.999), ("int8", 0.995)]
)
def test_latents_are_those_of_the_model(model, precision, cosine):
    images = torch.rand(3, 3, 64, 128) * 2 - 1
    expected = model.encode(images)
    latents = FrozenEncoder(model, precision)(images)
    assert latents.shape == expected.shape == (3, 4, 8, 16)
    assert latents.dtype == torch.float32
    assert latents.is_contiguous()
    assert not latents.requires_grad
    found = torch.cosine_similarity(latents.double().flatten(), expected.double().flatten(), dim=0).item()
    print(f"{precision}: cosine {found:.7f}")
    assert found >= cosine - 1e-12
    if precision == "fp32":
        assert (latents - expected).norm() <= 1e-4 * expected.norm()


def test_identity(model):
    encoder = FrozenEncoder(model, "bf16")
    before = encoder.identity
    assert FrozenEncoder(model, "bf16").identity == before
    assert FrozenEncoder(model, "int8").identity != before
    next(model.encoder_vq.parameters()).data[0] += 1
    assert encoder.identity != before


def test_bad_input(model, tiny_backbone):
    with pytest.raises(InputError, match="plain, fp32, bf16, fp16, int8, fp8, got 'int4'"):
        FrozenEncoder(model, "int4")
    with pytest.raises(InputError, match='"fp8" does not run on cpu'):
        FrozenEncoder(model, "fp8")
    with pytest.raises(InputError, match="multiples of 64"):
        FrozenEncoder(model)(torch.zeros(1, 3, 60, 64))
    trained = VPD.empty(VPDConfig(backbone=tiny_backbone, train_encoder=True))
    with pytest.raises(InputError, match="no frozen encoder"):
        FrozenEncoder(trained)
