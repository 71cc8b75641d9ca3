"""The diffusion schedule of Stable Diffusion and a DDIM sampler with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STEPS = 1000


def signal_levels() -> Tensor:
    """(1000,) float32: share of signal in the variance after t + 1 steps of Stable Diffusion's betas."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64).square()
    return (1 - betas).cumprod(0).float()


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Latents (B,C,h,w) as they are at `timesteps` (B,), 0..999."""
    level = signal_levels().to(latents.device)[timesteps][:, None, None, None]
    return level.sqrt() * latents + (1 - level).sqrt() * noise


def ddim_timesteps(steps: int) -> list[int]:
    """`steps` timesteps from 999 down, evenly spaced."""
    return [round((i + 1) * STEPS / steps) - 1 for i in reversed(range(steps))]


@torch.no_grad()
def ddim(predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int = 50, limit: float = 5.0) -> Tensor:
    """Latents out of noise (B,C,h,w), without randomness (Song et al., 2021).

    predict: noisy latents, timesteps (B,) -> noise. limit: latents have unit variance, so no estimate is larger.
    """
    levels = signal_levels().tolist()
    schedule = ddim_timesteps(steps)
    x = noise
    for t, following in zip(schedule, [*schedule[1:], None], strict=True):
        level, target = levels[t], 1.0 if following is None else levels[following]
        predicted = predict(x, torch.full((len(x),), t))
        clean = ((x - (1 - level) ** 0.5 * predicted) / level**0.5).clamp(-limit, limit)
        direction = (x - level**0.5 * clean) / (1 - level) ** 0.5
        x = target**0.5 * clean + (1 - target) ** 0.5 * direction
    return x


def guided(
    denoiser: Callable[[Tensor, Tensor, Tensor], Tensor], context: Tensor, empty: Tensor, guidance: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """What `ddim` takes, of a denoiser with texts context (B,L,C), each against the empty text's features (L,C)."""

    def predict(x: Tensor, timesteps: Tensor) -> Tensor:
        both = torch.cat([context, empty.expand_as(context)])
        with_text, without = denoiser(x.repeat(2, 1, 1, 1), timesteps.repeat(2), both).float().chunk(2)
        return without + guidance * (with_text - without)

    return predict
