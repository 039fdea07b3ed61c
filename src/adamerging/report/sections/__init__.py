"""The sections of a report, in order. Each is a function of the view that gives None where it has no data."""

from __future__ import annotations

from collections.abc import Callable

from ..document import Section
from ..view import View
from .coefficients import coefficients
from .confusion import confusion
from .convergence import convergence
from .cost import cost
from .entropy import entropy
from .geometry import geometry
from .normalised import kept
from .scale import scale
from .settings import settings
from .sharing import sharing
from .shift import shift
from .surface import surface
from .unseen import leave_out, unseen

SECTIONS: tuple[Callable[[View], Section | None], ...] = (
    kept,
    shift,
    unseen,
    leave_out,
    scale,
    convergence,
    coefficients,
    geometry,
    sharing,
    entropy,
    confusion,
    surface,
    cost,
    settings,
)


def sections(view: View) -> list[Section]:
    """Those that the run has data for."""
    return [section for make in SECTIONS if (section := make(view)) is not None]
