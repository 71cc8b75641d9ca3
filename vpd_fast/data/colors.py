"""Changes of colour for training, on (H,W,3) uint8 RGB; every one is a function of its drawn parameters."""

from __future__ import annotations

import cv2
import numpy as np

LEVELS = np.arange(256)
HUES = 180  # OpenCV's hues of 8-bit images


def linear(image: np.ndarray, factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
    """Scale and shift the levels, clipped and cut off to integers: brightness and contrast in mmsegmentation."""
    return cv2.LUT(image, np.clip(LEVELS.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8))


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiply HSV's S by a factor."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 1] = linear(hsv[..., 1], factor)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def hue(image: np.ndarray, shift: int) -> np.ndarray:
    """Shift HSV's H, modulo 180."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(int) + shift) % HUES
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def gamma(image: np.ndarray, exponent: float) -> np.ndarray:
    """Raise the levels, as fractions of 255, to a power: albumentations' RandomGamma."""
    return cv2.LUT(image, ((LEVELS / 255) ** exponent * 255).astype(np.uint8))


def shift_hsv(image: np.ndarray, hue_shift: float, saturation_shift: float, value_shift: float) -> np.ndarray:
    """Add to H (modulo 180), S and V (clipped): albumentations' HueSaturationValue."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    tables = [
        ((LEVELS + hue_shift) % HUES).astype(np.uint8),
        *(np.clip(LEVELS + shift, 0, 255).astype(np.uint8) for shift in (saturation_shift, value_shift)),
    ]
    channels = [cv2.LUT(hsv[..., i], table) for i, table in enumerate(tables)]
    return cv2.cvtColor(np.stack(channels, 2), cv2.COLOR_HSV2RGB)


def photometric_distortion(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Distort as mmsegmentation does: brightness +-32, contrast, saturation x 0.5 to 1.5, hue +-18, each half the time.

    Contrast comes second or last, by a coin.
    """

    def coin() -> bool:
        return bool(rng.integers(2))

    if coin():
        image = linear(image, 1.0, rng.uniform(-32, 32))
    contrast_first = coin()
    if contrast_first and coin():
        image = linear(image, rng.uniform(0.5, 1.5))
    if coin():
        image = saturation(image, rng.uniform(0.5, 1.5))
    if coin():
        image = hue(image, int(rng.integers(-18, 18)))
    if not contrast_first and coin():
        image = linear(image, rng.uniform(0.5, 1.5))
    return image


def jitter(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Depth's, albumentations' defaults: brightness and contrast +-0.2, gamma 0.8 to 1.2, hue +-20, saturation +-30,
    value +-20; each of the three steps with probability 1/2.
    """
    if rng.random() < 0.5:
        image = linear(image, 1 + rng.uniform(-0.2, 0.2), 255 * rng.uniform(-0.2, 0.2))
    if rng.random() < 0.5:
        image = gamma(image, rng.uniform(0.8, 1.2))
    if rng.random() < 0.5:
        image = shift_hsv(image, rng.uniform(-20, 20), rng.uniform(-30, 30), rng.uniform(-20, 20))
    return image
