"""Networks small enough for tests: what a test needs of Stable Diffusion's shape, and no more."""

from __future__ import annotations

from vpd_fast import BackboneConfig

# All its blocks, a tenth as wide.
SMALL = BackboneConfig(model_channels=32, context_dim=64, num_heads=4, vae_ch=32)
# One block a level, and widths that grow once: a third of the time and a fifth of the weights of SMALL. The least that
# takes single images of 64x64, where the lowest level has one position and its norms need two channels per group.
TINY = BackboneConfig(
    model_channels=32, context_dim=64, num_heads=4, num_res_blocks=1, channel_mult=(1, 1, 2, 2),
    vae_ch=32, vae_ch_mult=(1, 1, 2, 2), vae_num_res_blocks=1,
)  # fmt: skip
# The least of all, for images from 128x128.
LEAST = BackboneConfig(
    model_channels=32, context_dim=32, num_heads=4, num_res_blocks=1, channel_mult=(1, 1, 1, 1),
    vae_ch=32, vae_ch_mult=(1, 1, 1, 1), vae_num_res_blocks=1,
)  # fmt: skip
