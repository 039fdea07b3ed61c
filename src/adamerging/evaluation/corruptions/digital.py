"""Loss of contrast, of resolution, and by compression. Images are uint8 (H, W) or (H, W, 3)."""

from __future__ import annotations

import io

import numpy as np

from .pictures import Pixels, pillow


def contrast(image: Pixels, left: float, generator: np.random.Generator) -> Pixels:
    """Every value goes towards its channel's mean: ``(x - mean) · left + mean``."""
    del generator
    values = image / 255.0
    means = values.mean(axis=(0, 1), keepdims=True)
    result: Pixels = (((values - means) * left + means).clip(0, 1) * 255).astype(np.uint8)
    return result


def pixelate(image: Pixels, side: float, generator: np.random.Generator) -> Pixels:
    """Reduced to a share of its side by means of boxes, and brought back."""
    del generator
    module = pillow()
    height, width = image.shape[:2]
    small = (max(1, int(width * side)), max(1, int(height * side)))
    box = module.Resampling.BOX
    return np.array(module.fromarray(image).resize(small, box).resize((width, height), box))


def jpeg(image: Pixels, quality: int, generator: np.random.Generator) -> Pixels:
    """Compressed as JPEG of that quality, and opened again."""
    del generator
    module = pillow()
    buffer = io.BytesIO()
    module.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.array(module.open(buffer))
