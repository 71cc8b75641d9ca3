"""The estimate of memory against what real tensors take."""

from __future__ import annotations

import pytest
import torch

from vpd_fast import VPD, VPDConfig
from vpd_fast.models.random_weights import randomize
from vpd_fast.training.memory import LiveMemory, activation_bytes, estimate_memory

from ..helpers.backbones import LEAST

CONFIGS = {"segmentation": {"num_classes": 5, "channels": 32}, "referring": {"tokens": 6}, "depth": {"num_scenes": 3}}

MODELS = (
    *(("segmentation", "fp32", "plain"), ("segmentation", "bf16", "sdpa"), ("referring", "fp32", "sdpa")),
    ("depth", "fp32", "sdpa"),
)


def test_live_memory_counts_what_is_kept():
    x = torch.zeros(10, requires_grad=True)
    with LiveMemory([x]) as live:
        y = (x * 2).exp()  # keeps its result; x * 2 is gone
        assert live.bytes() == 40
        z = y[:5] + 1  # a view counts once
        assert live.bytes() == 60
    del z
    assert live.bytes() == 40


@pytest.mark.parametrize(
    ("task", "precision", "backend", "checkpointing"),
    [  # each kind of model in one way by default, and each way
        pytest.param(*model, checkpointing, marks=() if (i + j) % 3 == 0 else pytest.mark.slow)
        for i, model in enumerate(MODELS)
        for j, checkpointing in enumerate((False, (0,), True))
    ],
)
def test_estimates_are_what_real_tensors_take(task, precision, backend, checkpointing):
    config = VPDConfig(task=task, base_size=64, backbone=LEAST, **CONFIGS[task])
    options = {"batch_size": 2, "size": 64, "precision": precision}
    model = randomize(VPD.empty(config), 1).train()
    model.attention_backend = backend
    model.gradient_checkpointing_enable(checkpointing)
    real = activation_bytes(model, **options)
    found = estimate_memory(config, attention_backend=backend, checkpointing=checkpointing, **options)
    # Kernels may keep a few numbers of another size than their contracts say (seeds, statistics); nothing large.
    assert found["activations"] == pytest.approx(real, rel=0.02)


def test_parts():
    config = VPDConfig(num_classes=5, channels=32, base_size=64, backbone=LEAST)
    model = VPD.empty(config)
    found = estimate_memory(config, batch_size=2, size=64)
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found["weights"] == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert (found["gradients"], found["optimizer"]) == (trained, 2 * trained)
    assert found["total"] == sum(value for name, value in found.items() if name != "total")
    more = estimate_memory(config, batch_size=4, size=64)
    assert 1.8 < more["activations"] / found["activations"] < 2.1
    levels = [
        estimate_memory(config, batch_size=2, size=64, checkpointing=c)["activations"] for c in ((0,), (0, 1), True)
    ]
    levels = [found["activations"], *levels]
    assert levels == sorted(levels, reverse=True)
    assert len(set(levels)) == 4


def test_the_full_size_model_needs_no_memory_to_be_measured():
    """859.5 M parameters of the UNet train: 3.2 GiB of gradients. Plain attention keeps every probability."""
    fused = estimate_memory(VPDConfig(), batch_size=1, size=512)
    plain = estimate_memory(VPDConfig(), batch_size=1, size=512, attention_backend="plain")
    print(
        {name: f"{value / 2**30:.2f} GiB" for name, value in fused.items()}, plain["activations"] / fused["activations"]
    )
    assert 3.2 < fused["gradients"] / 2**30 < 3.4
    assert plain["activations"] > 2 * fused["activations"]
