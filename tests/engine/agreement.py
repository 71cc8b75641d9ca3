"""A fast model against the plain one, step by step: `python -m tests.engine.agreement PRECISION`, on a GPU."""

from __future__ import annotations

import sys

import torch

import vpd_fast
from vpd_fast import VPD, BackboneConfig, VPDConfig
from vpd_fast.bench.parity import cosine
from vpd_fast.models.random_weights import randomize

SMALL = BackboneConfig(model_channels=64, num_heads=4, context_dim=32, vae_ch=64)
GATES = {"fp32": 0.9999, "bf16": 0.999, "fp16": 0.999, "int8": 0.99, "fp8": 0.95}
SIZES = ((1, 256), (2, 128), (1, 256))  # images, pixels of a side


def make_model(device: str, backbone: BackboneConfig = SMALL) -> VPD:
    """A small model with weights made from a seed."""
    config = VPDConfig(num_classes=7, channels=64, base_size=256, backbone=backbone)
    return randomize(VPD(config), seed=1).eval().to(device)


def images(device: str, batch: int = 1, seed: int = 0, size: int = 256) -> torch.Tensor:
    """Noise in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, 3, size, size, generator=generator) * 2 - 1).to(device)


def compare(model: VPD, precision: str, graphs: bool, sizes: tuple[tuple[int, int], ...] = SIZES) -> None:
    """Fails unless features and result agree with the plain model's, also where a size comes again.

    Before each step a line says which it is.
    """
    device = str(next(model.parameters()).device)
    print(f"{precision}, {graphs=}: the fast model is made")
    fast = vpd_fast.optimize(model, precision, graphs=graphs)
    for batch, size in sizes:
        x, step = images(device, batch, size=size), f"{precision}, {graphs=}, {batch} images of {size}x{size}"
        print(f"{step}: plain model")
        with torch.no_grad():
            expected = [*model.extract_feat(x), model(x)]
        print(f"{step}: features")
        actual = [*fast.extract_feat(x)]
        print(f"{step}: result")
        actual.append(fast(x))
        for one, plain in zip(actual, expected, strict=True):
            assert cosine(one, plain) >= GATES[precision], step


def main(precision: str) -> None:
    """Without graphs first, so that a death in a capture is none in a kernel."""
    model = make_model("cuda")
    for graphs in (False, True):
        compare(model, precision, graphs)


if __name__ == "__main__":
    main(*sys.argv[1:])
