"""Canny's edges, as OpenCV finds them: the drops of `spatter` are defined by these."""

from __future__ import annotations

from typing import Any

import numpy as np

from .pictures import Pixels

_TAN = 0.4142135623730951  # of 22.5°


def canny(image: Pixels, low: float, high: float) -> np.ndarray[Any, Any]:
    """Edges of a grey image: Sobel gradients with L1 norm, thinned, kept where connected to a strong one.

    Args:
        image: uint8 ``(H, W)``.
        low: gradients above it may be edges.
        high: gradients above it are.

    Returns:
        bool ``(H, W)``.
    """
    from scipy import ndimage

    values = image.astype(np.float32)
    across, down = (ndimage.sobel(values, axis, mode="nearest") for axis in (1, 0))
    size = np.abs(across) + np.abs(down)
    thin = _peaks(size, across, down) & (size > low)
    parts, count = ndimage.label(thin, np.ones((3, 3)))
    strong = np.zeros(count + 1, bool)
    strong[parts[thin & (size > high)]] = True
    strong[0] = False
    edges: np.ndarray[Any, Any] = strong[parts]
    return edges


def _peaks(
    size: np.ndarray[Any, Any], across: np.ndarray[Any, Any], down: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Where the gradient is the largest along its own direction, one of four."""
    height, width = size.shape
    around = np.zeros((height + 2, width + 2), size.dtype)
    around[1:-1, 1:-1] = size

    def beside(y: int, x: int) -> np.ndarray[Any, Any]:
        return around[1 + y : 1 + y + height, 1 + x : 1 + x + width]

    wide, tall = np.abs(across), np.abs(down)
    flat, steep = tall < wide * _TAN, tall * _TAN > wide
    falling = (across < 0) != (down < 0)
    horizontal = (size > beside(0, -1)) & (size >= beside(0, 1))
    vertical = (size > beside(-1, 0)) & (size >= beside(1, 0))
    one = (size > beside(-1, -1)) & (size > beside(1, 1))
    other = (size > beside(-1, 1)) & (size > beside(1, -1))
    found: np.ndarray[Any, Any] = np.where(
        flat, horizontal, np.where(steep, vertical, np.where(falling, other, one))
    )
    return found
