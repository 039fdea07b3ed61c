"""Every corruption by its name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...errors import UsageError
from . import text
from .blur import motion_blur
from .digital import contrast, jpeg, pixelate
from .noise import gaussian_noise, impulse_noise
from .spatter import spatter

InputKind = Literal["image", "text"]


@dataclass(frozen=True)
class Corruption:
    """One way in which inputs go bad.

    Attributes:
        name: as recipes and conditions call it.
        kind: what it is for.
        apply: for images ``(pixels, setting, numpy generator) → pixels``, the setting from `severities`; for
            texts ``(word, Random) → word or None``, see `text`.
        about: one line.
    """

    name: str
    kind: InputKind
    apply: Callable[..., Any]
    about: str


CORRUPTIONS: Mapping[str, Corruption] = {
    corruption.name: corruption
    for corruption in (
        Corruption("motion_blur", "image", motion_blur, "a moving camera"),
        Corruption("impulse_noise", "image", impulse_noise, "salt and pepper"),
        Corruption("gaussian_noise", "image", gaussian_noise, "noise of a sensor in the dark"),
        Corruption("pixelate", "image", pixelate, "too few pixels, enlarged"),
        Corruption("spatter", "image", spatter, "drops of water or mud"),
        Corruption("contrast", "image", contrast, "weak contrast"),
        Corruption("jpeg", "image", jpeg, "strong compression"),
        Corruption("typos", "text", text.typos, "swap, deletion, keyboard or insertion, mixed"),
        Corruption("swap", "text", text.swap, "two neighbouring letters change places"),
        Corruption("casing", "text", text.casing, "small and capital letters change"),
        Corruption("deletion", "text", text.deletion, "a letter is left out"),
        Corruption("keyboard", "text", text.keyboard, "a letter becomes that of a neighbouring key"),
    )
}


def find(name: str) -> Corruption:
    """The corruption of a name.

    Raises:
        UsageError: there is none; the nearest is named.
    """
    if name in CORRUPTIONS:
        return CORRUPTIONS[name]
    close = difflib.get_close_matches(str(name), CORRUPTIONS, n=1, cutoff=0.5)
    known = "; ".join(f"for {kind}s: {', '.join(names_for(kind))}" for kind in ("image", "text"))
    raise UsageError(
        f"there is no corruption {name!r}" + (f", did you mean '{close[0]}'?" if close else f"; {known}")
    )


def names_for(kind: str) -> tuple[str, ...]:
    """Names of the corruptions for images, or for texts."""
    return tuple(name for name, corruption in CORRUPTIONS.items() if corruption.kind == kind)
