"""Spherical linear interpolation between two experts."""

from __future__ import annotations

import math

from torch import Tensor

from .gram import Of, combine
from .options import Fraction
from .registry import register
from .stage import Method, Stream

_NEARLY_PARALLEL = 0.9995


@register(
    "slerp",
    paper="Shoemake, Animating rotation with quaternion curves, 1985",
    cost="two passes",
)
def slerp(t: Fraction = 0.5, of: Of = "weights") -> Method:
    """Move along the arc from the first expert (t = 0) to the second (t = 1), tensor by tensor.

    Where the two are nearly parallel (|cos| > 0.9995) or one is zero, the way is a straight line.

    Args:
        t: how far; a number, or a schedule by name or over depth.
        of: interpolate the weights themselves, or the task vectors.
    """

    def coefficients(products: Tensor, stream: Stream) -> tuple[float, float]:
        position = stream.setting(t)
        norms = float(products[0, 0] * products[1, 1]) ** 0.5
        cosine = max(-1.0, min(1.0, float(products[0, 1]) / norms)) if norms > 0 else 1.0
        if abs(cosine) > _NEARLY_PARALLEL:
            return 1 - position, position
        angle = math.acos(cosine)
        return math.sin((1 - position) * angle) / math.sin(angle), math.sin(position * angle) / math.sin(
            angle
        )

    return Method("slerp", reduce=combine("slerp", of, coefficients), weighted=False, experts=(2, 2))
