"""Exact rewrites of a VPD model's weights: the same function of the image in fewer or cheaper operations.

Each takes weights and returns weights; none rounds beyond the dtype it computes in. `REWRITES` lists what each saves.
The sums and products are those of the model in another order, so in float64 nothing but rounding at 1e-15 changes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vpd_fast.models.unet import UNet, timestep_embedding

# name: (what it does, what it saves for a 512x512 segmentation image at Stable Diffusion 1.5's size)
REWRITES = {
    "time": ("the time embedding of t = 1 becomes part of the residual blocks' biases", "24 matrix-vector products"),
    "text": ("keys and values of a text are kept and used again", "5.8 GFLOP"),
    "one token": ("cross-attention to a single token is a bias", "25.7 GFLOP (depth only)"),
    "upsampling": (
        "nearest x2 and its 3x3 convolution are one Winograd transform of 9 products, or 2x2 convolutions for 4 phases",
        "50.9 or 37.7 of 67.9 GFLOP",
    ),
    "latent mean": (
        "quant_conv and the latents' scale are folded into conv_out, without the log-variance",
        "half of both",
    ),
    "one-head attention": ("the KL encoder's W_q^T W_k and W_o W_v are one matrix each", "4.3 GFLOP"),
    "feed-forward": (
        "the second linear layer and proj_out are one matrix over two inputs",
        "16 passes over the tokens",
    ),
    "qkv": ("queries, keys and values of self-attention are one product", "32 products' reads of the tokens"),
    "layer norm": ("scales and shifts of layer norms are folded into the next weight", "48 multiply-adds per channel"),
    "batch norm": ("batch norms of the heads are folded into their convolutions", "9 passes"),
    "concatenation": ("convolutions read skip connections where they are", "63 MB of copies"),
    "padding": ("zeros around an image are supplied while it is read", "235 MB of copies"),
    "dead outputs": ("neither the UNet's output layers nor the log-variance are computed", "0.2 GFLOP"),
}


def fold_layer_norm(weight: Tensor, bias: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """W (norm(x)) + b with weight (n,k) -> the weight and bias that take the normalised x without scale and shift."""
    shift = weight @ norm.bias
    return weight * norm.weight, shift if bias is None else bias + shift


def fold_batch_norm(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """A convolution's weight (n, ...) and bias with the batch norm after it (its running statistics) in them."""
    running_mean, running_var = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    factor = norm.weight / torch.sqrt(running_var + norm.eps)
    mean = running_mean if bias is None else running_mean - bias
    return weight * factor.view(-1, *[1] * (weight.dim() - 1)), norm.bias - mean * factor


def time_embedding(unet: UNet, t: int = 1) -> Tensor:
    """The embedding (emb_channels,) of step t."""
    weight = next(unet.time_embed.parameters())
    steps = torch.full((1,), t, device=weight.device)
    return unet.time_embed(timestep_embedding(steps, unet.model_channels).to(weight.dtype))[0]


def fold_time(bias: Tensor, emb_layers: nn.Sequential, embedding: Tensor) -> Tensor:
    """Bias (n,) of a residual block's first convolution with the projected embedding added."""
    return bias + emb_layers(embedding)


def fold_latent_mean(conv_out: nn.Conv2d, quant_conv: nn.Conv2d, latent_scale: float) -> tuple[Tensor, Tensor]:
    """Weight (c,C,3,3) and bias (c,) of one convolution that gives the scaled mean, the first c = half the moments."""
    half = quant_conv.out_channels // 2
    mix = quant_conv.weight[:half, :, 0, 0] * latent_scale
    bias = mix @ conv_out.get_parameter("bias") + quant_conv.get_parameter("bias")[:half] * latent_scale
    return torch.einsum("mn,nchw->mchw", mix, conv_out.weight), bias


def merge_one_head_attention(
    q: nn.Conv2d, k: nn.Conv2d, v: nn.Conv2d, out: nn.Conv2d
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Four 1x1 convolutions of one-head attention -> (weight, bias) before and (weight, bias) after it.

    softmax(q(h) k(h)^T) v(h) through `out` equals softmax(before(h) h^T) h through `after`: what all scores of a query
    have in common drops out of its softmax, and the probabilities of a query add up to 1.
    """
    wq, wk, wv, wo = (conv.weight[:, :, 0, 0] for conv in (q, k, v, out))
    bq, bv, bo = (conv.get_parameter("bias") for conv in (q, v, out))
    return (wk.T @ wq, wk.T @ bq), (wo @ wv, wo @ bv + bo)


def merge_feed_forward(ff2: nn.Linear, proj_out: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """proj_out(ff2(g) + t) as one weight (n, k + n) over [g, t], and its bias."""
    p = proj_out.weight[:, :, 0, 0]
    return torch.cat([p @ ff2.weight, p], dim=1), p @ ff2.bias + proj_out.get_parameter("bias")


def phase_weights(weight: Tensor) -> Tensor:
    """Nearest enlargement x2 and then a 3x3 convolution (n,c,3,3), as 2x2 convolutions (4,n,c,2,2) of the input.

    One for each phase (y, x) of the result's positions: (0,0), (0,1), (1,0), (1,1). Phase 0 of an axis reads the
    position before its own and its own, phase 1 its own and the next.
    """
    first, second, third = weight.unbind(2)  # rows
    rows = torch.stack([first, second + third, first + second, third]).unflatten(0, (2, 2))  # phase, row, n, c, column
    first, second, third = rows.unbind(-1)
    both = torch.stack([first, second + third, first + second, third]).unflatten(0, (2, 2))  # x, column, y, row, n, c
    return both.permute(2, 0, 4, 5, 3, 1).flatten(0, 1)


def deconvolution_as_linear(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A 2x2 transposed convolution of stride 2, weight (k,n,2,2), as rows: n channels of each of the 4 pixels."""
    return weight.permute(2, 3, 1, 0).flatten(0, 2), bias.repeat(4)
