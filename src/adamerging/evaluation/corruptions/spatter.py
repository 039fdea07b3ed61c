"""Drops of water or mud on the lens."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import MissingExtraError
from .edges import canny
from .pictures import Pixels

_WATER = np.array([175, 238, 238], np.float32) / 255  # pale turquoise
_MUD = np.array([63, 42, 20], np.float32) / 255
_GREY = np.array([0.299, 0.587, 0.114], np.float32)
_FARTHEST = 20  # pixels from the rim of a drop; beyond that all is equal
_RELIEF = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], np.float32)


def spatter(
    image: Pixels, setting: tuple[float, float, float, float, float, str], generator: np.random.Generator
) -> Pixels:
    """Smooth noise above a threshold makes drops: of water, which shine at the rim, or of mud.

    The steps and numbers are those of ImageNet-C, the exact Euclidean distance for an approximation of it.
    A grey image gets the brightness of the colour.

    Args:
        image: uint8 ``(H, W)`` or ``(H, W, 3)``.
        setting: see `severities`.
        generator: draws the noise.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    mean, deviation, sigma, threshold, strength, kind = setting
    filters = _scipy()
    layer = generator.normal(mean, deviation, image.shape[:2])
    layer = filters.gaussian_filter(layer, sigma, mode="nearest")
    if kind == "mud":
        cover = filters.gaussian_filter((layer > threshold).astype(np.float32), strength, mode="nearest")
        cover[cover < 0.8] = 0
        colour = _MUD
    else:
        layer[layer < threshold] = 0
        cover = strength * _shine((layer * 255).clip(0, 255).astype(np.uint8), filters)
        colour = _WATER
    values = image.astype(np.float32) / 255
    if image.ndim == 3:
        cover = cover[:, :, None]
    else:
        colour = (_GREY * colour).sum()
    if kind == "mud":
        values *= 1 - cover
    result: Pixels = ((values + cover * colour).clip(0, 1) * 255).astype(np.uint8)
    return result


def _shine(drops: Pixels, filters: Any) -> np.ndarray[Any, Any]:
    """From 0 to 1, how bright each pixel of the drops is: embossed by the distance to the rim."""
    rim = canny(drops, 50, 150)
    if rim.any():
        distance = np.minimum(filters.distance_transform_edt(~rim), _FARTHEST)
    else:
        distance = np.full(drops.shape, float(_FARTHEST))
    levels = filters.uniform_filter(distance, 3, mode="mirror").astype(np.uint8)
    relief = filters.correlate(_equalised(levels).astype(np.float32), _RELIEF, mode="mirror").clip(0, 255)
    relief = np.rint(filters.uniform_filter(relief, 3, mode="mirror"))
    bright: np.ndarray[Any, Any] = (drops * relief).astype(np.float32)
    return bright / max(float(bright.max()), 1.0)


def _equalised(levels: Pixels) -> Pixels:
    """Levels spread over 0 to 255 by their cumulative counts; a single level stays."""
    counts = np.bincount(levels.reshape(-1), minlength=256)
    lowest = int(counts.nonzero()[0][0])
    rest = levels.size - int(counts[lowest])
    if not rest:
        return levels
    above = counts.cumsum() - counts[lowest]
    spread: Pixels = np.rint(above.clip(0) * (255 / rest)).astype(np.uint8)
    return spread[levels]


def _scipy() -> Any:
    try:
        from scipy import ndimage
    except ImportError:
        raise MissingExtraError("scipy", "evaluate", "the corruption 'spatter'") from None
    return ndimage
