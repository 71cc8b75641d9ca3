"""Each rewrite alone, in float64: the same numbers as the layers it replaces, to rounding."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpd_fast.config import VPDConfig
from vpd_fast.engine import rewrites
from vpd_fast.models.attention import CrossAttention
from vpd_fast.models.unet import ResBlock, UNet
from vpd_fast.ops import winograd_weight

from ..helpers.backbones import TINY

# Sums of at most some thousand float64 products in two orders: 1e-16 times a small factor; 1e-12 leaves room for the
# cancellation in softmax arguments, and any mistake is larger by many orders.
RTOL = 1e-12
TINY_16 = dataclasses.replace(TINY, context_dim=16)


@pytest.fixture(autouse=True)
def _float64() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype == torch.float64
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error < RTOL, error


def random_norm(norm: nn.Module) -> nn.Module:
    nn.init.normal_(norm.weight, 1.0, 0.3)
    nn.init.normal_(norm.bias)
    return norm


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(bias: bool) -> None:
    linear, norm, x = nn.Linear(24, 10, bias=bias), random_norm(nn.LayerNorm(24)), torch.randn(7, 24)
    weight, shift = rewrites.fold_layer_norm(linear.weight, linear.bias, norm)
    assert_same(F.linear(F.layer_norm(x, (24,), eps=norm.eps), weight, shift), linear(norm(x)))


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm(bias: bool) -> None:
    conv, norm, x = nn.Conv2d(5, 6, 3, bias=bias), random_norm(nn.BatchNorm2d(6)).eval(), torch.randn(2, 5, 8, 8)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 3.0)
    assert_same(F.conv2d(x, *rewrites.fold_batch_norm(conv.weight, conv.bias, norm)), norm(conv(x)))


@torch.no_grad()
def test_time() -> None:
    unet = UNet(TINY_16)
    block = next(m for m in unet.modules() if isinstance(m, ResBlock))
    embedding = rewrites.time_embedding(unet)
    x = torch.randn(2, 32, 8, 8)
    conv = block.in_layers[2]
    bias = rewrites.fold_time(conv.bias, block.emb_layers, embedding)
    h = block.in_layers[1](block.in_layers[0](x))
    expected = block.in_layers(x) + block.emb_layers(embedding[None])[:, :, None, None]
    assert_same(F.conv2d(h, conv.weight, bias, padding=1), expected)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.18215])
def test_latent_mean(scale: float) -> None:
    conv, quant, x = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 8, 1), torch.randn(2, 16, 6, 6)
    expected = quant(conv(x)).chunk(2, dim=1)[0] * scale
    assert_same(F.conv2d(x, *rewrites.fold_latent_mean(conv, quant, scale), padding=1), expected)


@torch.no_grad()
def test_one_head_attention() -> None:
    q, k, v, out = (nn.Conv2d(16, 16, 1) for _ in range(4))
    h = torch.randn(2, 16, 3, 4)
    rows = [conv(h).flatten(2).transpose(1, 2) for conv in (q, k, v)]
    attended = torch.softmax(rows[0] @ rows[1].transpose(1, 2) / 4, dim=-1) @ rows[2]
    expected = out(attended.transpose(1, 2).unflatten(2, (3, 4))).flatten(2).transpose(1, 2)
    before, after = rewrites.merge_one_head_attention(q, k, v, out)
    rows = h.flatten(2).transpose(1, 2)
    merged = torch.softmax(F.linear(rows, *before) @ rows.transpose(1, 2) / 4, dim=-1) @ rows
    assert_same(F.linear(merged, *after), expected)


@torch.no_grad()
def test_feed_forward() -> None:
    ff2, proj, g, t = nn.Linear(32, 8), nn.Conv2d(8, 8, 1), torch.randn(5, 32), torch.randn(5, 8)
    expected = F.linear(ff2(g) + t, proj.weight[:, :, 0, 0], proj.bias)
    assert_same(F.linear(torch.cat([g, t], dim=1), *rewrites.merge_feed_forward(ff2, proj)), expected)


@torch.no_grad()
def test_one_token() -> None:
    attention, x, context = CrossAttention(16, 12, 4), torch.randn(2, 9, 16), torch.randn(2, 1, 12)
    expected, _ = attention(x, context)
    assert_same(attention.to_out(attention.to_v(context)).expand(2, 9, 16), expected)


@torch.no_grad()
def test_deconvolution() -> None:
    deconv, x = nn.ConvTranspose2d(6, 5, 2, stride=2), torch.randn(2, 6, 3, 4)
    rows = F.linear(x.permute(0, 2, 3, 1), *rewrites.deconvolution_as_linear(deconv.weight, deconv.bias))
    pixels = rows.view(2, 3, 4, 2, 2, 5).transpose(2, 3).reshape(2, 6, 8, 5)
    assert_same(pixels.permute(0, 3, 1, 2), deconv(x))


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (5, 4)])
def test_upsampling(height: int, width: int) -> None:
    """Nine of the sixteen products of a Winograd tile of the upsampled image."""
    weight, x = torch.randn(4, 3, 3, 3), torch.randn(1, 3, height, width)
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)
    to_tile = torch.tensor([[1.0, -1, 0], [0, 1, 0], [0, 1, -1]])
    from_tile = torch.tensor([[1.0, 1, 0], [0, 1, -1]])
    tiles = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)  # 1, c, h, w, 3, 3
    transformed = torch.einsum("ij,bchwjk,lk->ilbchw", to_tile, tiles, to_tile).flatten(0, 1)

    def pixels_of(from_tile: Tensor, weight: Tensor, transformed: Tensor) -> Tensor:
        products = torch.einsum("tnc,tbchw->tbnhw", weight, transformed).unflatten(0, (3, 3))
        return torch.einsum("yi,xl,ilbnhw->bnhywx", from_tile, from_tile, products).flatten(4, 5).flatten(2, 3)

    factors = from_tile, winograd_weight(weight, 9).double(), transformed
    # Of the terms of each sum the weight is rounded once, to float32; what float64 rounds is far below a hundredth.
    budget = 1.01 * 2.0**-24 * pixels_of(*(f.abs() for f in factors))
    assert ((pixels_of(*factors) - expected).abs() <= budget).all()


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (5, 4)])
def test_phases(height: int, width: int) -> None:
    weight, x = torch.randn(4, 3, 3, 3), torch.randn(2, 3, height, width)
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)
    actual = torch.empty_like(expected)
    for phase, kernel in enumerate(rewrites.phase_weights(weight)):
        y, x_ = divmod(phase, 2)
        actual[:, :, y::2, x_::2] = F.conv2d(F.pad(x, (1 - x_, x_, 1 - y, y)), kernel)
    assert_same(actual, expected)


def test_every_rewrite_is_listed_and_used() -> None:
    """The table names what the layers of the three tasks were made with, and nothing else."""
    from vpd_fast import VPD
    from vpd_fast.engine.specs import layer_specs

    torch.set_default_dtype(torch.float32)
    used = set()
    for task in ("segmentation", "referring", "depth"):
        model = VPD(VPDConfig(task=task, num_classes=5, tokens=4, num_scenes=3, base_size=64, backbone=TINY_16))
        used |= {name for spec in layer_specs(model.eval()) for name in spec.rewrites}
    assert used == set(rewrites.REWRITES)


def test_the_table_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs/engine.md").read_text(encoding="utf-8")
    for name, (what, saving) in rewrites.REWRITES.items():
        assert f"| {name} | {what} | {saving} |" in text
