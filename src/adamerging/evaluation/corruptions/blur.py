"""Blur along a line, as a moving camera makes it."""

from __future__ import annotations

import math

import numpy as np

from .pictures import Pixels

_NEGLIGIBLE = 1e-5
"""A weight that moves no value by a hundredth of a grey level."""


def motion_blur(image: Pixels, setting: tuple[int, float], generator: np.random.Generator) -> Pixels:
    """Each pixel becomes a mean of those along a line of random direction, within 45° of the horizontal.

    The weights are half a bell curve that starts at the pixel (ImageMagick's motion blur, which
    ImageNet-C was made with). Beyond the border the outermost pixels go on.

    Args:
        image: uint8 ``(H, W)`` or ``(H, W, 3)``.
        setting: the radius r, which gives 2r + 1 places on the line, and the deviation of the bell curve.
        generator: draws the direction.
    """
    radius, sigma = setting
    places = np.arange(2 * radius + 1)
    weights = np.exp(-(places**2) / (2 * sigma**2))
    weights /= weights.sum()
    places = places[weights > _NEGLIGIBLE]
    angle = generator.uniform(-math.pi / 4, math.pi / 4)
    right = np.ceil(places * math.cos(angle) - 0.5).astype(int)
    down = np.ceil(places * math.sin(angle) - 0.5).astype(int)
    height, width = image.shape[:2]
    top, bottom = max(0, -int(down.min())), max(0, int(down.max()))
    around = [(top, bottom), (0, int(right.max())), (0, 0)][: image.ndim]
    wide = np.pad(image, around, mode="edge").astype(np.float32)
    total = np.full(image.shape, 0.5, np.float32)  # rounds when the fraction is cut off
    part = np.empty_like(total)
    for weight, x, y in zip(weights.astype(np.float32), right, down + top, strict=False):
        np.multiply(wide[y : y + height, x : x + width], weight, out=part)
        total += part
    return total.clip(0, 255).astype(np.uint8)
