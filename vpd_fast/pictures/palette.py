"""Colours that are easy to tell apart, however many classes there are."""

from __future__ import annotations

from functools import cache

import numpy as np

PALETTE_SIZE = 256  # more classes than this share colours
_LINEAR_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_LMS_TO_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def palette(count: int) -> np.ndarray:
    """Return RGB colours (count, 3) uint8; always the same, and palette(n) is the start of palette(m) for n < m.

    Each colour is the one farthest in Oklab from all before it, and from black, white and grey, which photos are full
    of.
    """
    return _palette()[np.arange(count) % PALETTE_SIZE]


@cache
def _palette() -> np.ndarray:
    levels = np.linspace(0, 1, 18)
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    lab = _oklab(rgb)
    lightness, chroma = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2])
    visible = (lightness > 0.45) & (lightness < 0.92) & (chroma > 0.07) & (chroma < 0.2)
    rgb, lab = rgb[visible], lab[visible]
    greys = _oklab(np.linspace(0, 1, 5)[:, None].repeat(3, 1))
    distance = np.linalg.norm(lab[:, None] - greys[None], axis=2).min(1)
    colours = []
    for _ in range(PALETTE_SIZE):
        farthest = int(distance.argmax())
        colours.append(rgb[farthest])
        distance = np.minimum(distance, np.linalg.norm(lab - lab[farthest], axis=1))
    return np.rint(np.stack(colours) * 255).astype(np.uint8)


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """Convert sRGB in [0, 1] to Oklab (Ottosson 2020), whose distances fit perception better than CIELAB's in blues."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _LINEAR_TO_LMS.T) @ _LMS_TO_OKLAB.T
