"""Inputs of every kind that may be an image ↔ 8-bit pixels, in which the corruptions are defined."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from ...errors import MissingExtraError, UsageError
from ...tasks.data import as_array
from ...tasks.pictures import open_image
from ...tasks.readers import IMAGE_SUFFIXES

Pixels: TypeAlias = "np.ndarray[Any, Any]"
"""uint8 ``(H, W)`` or ``(H, W, 3)``."""

LARGEST = 256
"""Images whose shorter side has more pixels are corrupted at this one."""
LEAST = 8
"""What is smaller than this on a side is no image."""


@dataclass(frozen=True)
class Picture:
    """An image to corrupt.

    Attributes:
        pixels: what the corruption sees.
        back: pixels → an input of the kind it was made from.
    """

    pixels: Pixels
    back: Callable[[Pixels], Any]


def may_be_picture(value: Any) -> bool:
    """Whether an input looks like an image, without opening it; floats must lie in [0, 1]."""
    if isinstance(value, str | Path):
        return Path(value).suffix.lower() in IMAGE_SUFFIXES and Path(value).is_file()
    if _is_encoded(value) or type(value).__module__.startswith("PIL."):
        return True
    return hasattr(value, "shape") and hasattr(value, "dtype") and not _problem(as_array(value))


def open_picture(value: Any, where: str) -> Picture:
    """The pixels of an input.

    Args:
        value: a PIL image, a file, encoded bytes, or an array or tensor ``(H, W)``, ``(H, W, C)`` or
            ``(C, H, W)`` with 1, 3 or 4 channels: uint8, or floats in [0, 1], which are brought to 8 bits.
            A fourth channel stays as it is.
        where: for messages.

    Raises:
        UsageError: it is no such image.
        MissingExtraError: Pillow is needed and not installed.
    """
    if isinstance(value, str | Path) or _is_encoded(value) or type(value).__module__.startswith("PIL."):
        return Picture(_reduced(np.array(open_image(value))), lambda pixels: pillow().fromarray(pixels))
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise UsageError(f"{where} is a {type(value).__name__}, not an image")
    array = as_array(value)
    if problem := _problem(array):
        raise UsageError(f"{where} {problem}")
    first = array.ndim == 3 and array.shape[-1] not in (1, 3, 4)
    planes = array.transpose(1, 2, 0) if first else array
    colours = planes[:, :, :3] if planes.ndim == 3 else planes
    colours = colours[:, :, 0] if colours.ndim == 3 and colours.shape[2] == 1 else colours
    whole = array.dtype == np.uint8
    pixels = np.ascontiguousarray(colours if whole else np.rint(colours * 255).astype(np.uint8))

    def back(changed: Pixels) -> Any:
        changed = _resized(changed, colours.shape[1], colours.shape[0])
        result = planes.copy()
        values = changed if whole else changed / 255
        if planes.ndim == 3:
            result[:, :, :3] = values.reshape(*values.shape[:2], -1)
        else:
            result[...] = values
        result = np.ascontiguousarray(result.transpose(2, 0, 1)) if first else result
        if isinstance(value, Tensor):
            import torch

            return torch.from_numpy(result).to(value)
        return result

    return Picture(_reduced(pixels), back)


def pillow() -> Any:
    """Pillow's ``Image`` module.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("pillow", "evaluate", "corrupting images") from None
    return Image


def _is_encoded(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes)


def _problem(array: np.ndarray[Any, Any]) -> str:
    """Why an array is no image; empty where it is one."""
    shape = list(array.shape)
    if array.ndim not in (2, 3) or (array.ndim == 3 and not {shape[0], shape[-1]} & {1, 3, 4}):
        return f"has the shape {shape}; an image has (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels"
    sides = shape if array.ndim == 2 else shape[:2] if shape[-1] in (1, 3, 4) else shape[1:]
    if min(sides) < LEAST:
        return f"has the shape {shape}; an image to corrupt has at least {LEAST} pixels on each side"
    if array.dtype == np.uint8:
        return ""
    if array.dtype.kind != "f":
        return f"holds {array.dtype}; an image to corrupt holds uint8, or floats from 0 to 1"
    if not (array.min() >= 0 and array.max() <= 1):  # false for NaN too
        return (
            f"holds values from {array.min():.3g} to {array.max():.3g}; floats must lie in [0, 1]. "
            "Give the images before they are normalised, and normalise them in collate"
        )
    return ""


def _reduced(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[:2]
    scale = LARGEST / min(height, width)
    return pixels if scale >= 1 else _resized(pixels, round(width * scale), round(height * scale))


def _resized(pixels: Pixels, width: int, height: int) -> Pixels:
    if pixels.shape[:2] == (height, width):
        return pixels
    module = pillow()
    return np.array(module.fromarray(pixels).resize((width, height), module.Resampling.BICUBIC))
