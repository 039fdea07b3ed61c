"""Noise of sensors and of transmission. Images are uint8 (H, W) or (H, W, 3)."""

from __future__ import annotations

import numpy as np

from .pictures import Pixels


def gaussian_noise(image: Pixels, deviation: float, generator: np.random.Generator) -> Pixels:
    """Independent normal noise on every value, of a deviation that is a share of the whole range."""
    noise = generator.standard_normal(image.shape, dtype=np.float32)
    return (image + noise * np.float32(255 * deviation)).clip(0, 255).astype(np.uint8)


def impulse_noise(image: Pixels, share: float, generator: np.random.Generator) -> Pixels:
    """Salt and pepper: a share of the values, each by itself, becomes 0 or 255 with equal chance."""
    draws = generator.integers(0, 65536, image.shape, dtype=np.uint16)
    half = round(share * 32768)
    noisy = image.copy()
    noisy[draws < half] = 0
    noisy[draws >= 65536 - half] = 255
    return noisy
