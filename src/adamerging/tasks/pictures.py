"""Images from files, encoded bytes, arrays and PIL images."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MissingExtraError, UsageError
from .data import as_array, beginning


def open_image(value: Any, mode: str | None = None) -> Any:
    """A PIL image from an array, a file, encoded bytes ``{"bytes": ...}``, or a PIL image.

    Args:
        value: arrays are uint8 ``(H, W)``, or of 1, 3 or 4 channels, first or last.
        mode: Pillow's name of the wanted mode; None for ``L`` where the image is grey, else ``RGB``.

    Raises:
        UsageError: it cannot be opened.
        MissingExtraError: Pillow is not installed.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingExtraError("pillow", "data", "preparing images") from None
    if isinstance(value, Mapping):
        value = io.BytesIO(value["bytes"])
    if isinstance(value, str | Path | io.BytesIO):
        try:
            with Image.open(value) as opened:
                return opened.convert(mode or _plain_mode(opened))
        except (OSError, UnidentifiedImageError) as error:
            what = "an image" if isinstance(value, io.BytesIO) else _shown(value)
            raise UsageError(f"{what} cannot be opened: {error.strerror or error}") from None
        except ValueError as error:  # a null character, in a text that is no name of a file
            raise UsageError(f"{_shown(value)} cannot be opened: {error}") from None
    if not isinstance(value, Image.Image):
        value = Image.fromarray(_height_width_channels(as_array(value)))
    return value.convert(mode or _plain_mode(value))


def _shown(value: Any) -> str:
    """A path, whole; a text, which may be no name of a file, in quotes and as much as there is room for."""
    return str(value) if isinstance(value, Path) else f"the image file '{beginning(value)}'"


def _plain_mode(image: Any) -> str:
    return "L" if image.mode in ("1", "L", "LA") else "RGB"


def _height_width_channels(array: Any) -> Any:
    if array.ndim == 2:
        return array
    if array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.ascontiguousarray(array.transpose(1, 2, 0))
    if array.shape[-1] not in (1, 3, 4):
        raise UsageError(f"an image of shape {list(array.shape)} has neither 1, 3 nor 4 channels")
    return array[:, :, 0] if array.shape[-1] == 1 else array
