"""How strong each image corruption is at severities 1 to 5, for images of three sizes.

Hendrycks & Dietterich (2019), "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", published three sets of numbers: ImageNet-C for images of 224 pixels, Tiny ImageNet-C for
64, CIFAR-10-C for 32. The set whose size is nearest to the image's shorter side, by ratio, is the one used:
CIFAR-10-C up to 45 pixels, Tiny ImageNet-C up to 119, ImageNet-C from 120 on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

SEVERITIES = (1, 2, 3, 4, 5)

# Mean and deviation of the noise that makes drops, its blur, the threshold of a drop, the strength (of
# water) or blur (of mud), and which of the two it is.
_SPATTER_32 = (
    (0.62, 0.1, 0.7, 0.7, 0.5, "water"), (0.65, 0.1, 0.8, 0.7, 0.5, "water"),
    (0.65, 0.3, 1, 0.69, 0.5, "water"), (0.65, 0.1, 0.7, 0.69, 0.6, "mud"),
    (0.65, 0.1, 0.5, 0.68, 0.6, "mud"),
)  # fmt: skip
_SPATTER_64 = (
    (0.62, 0.1, 0.7, 0.7, 0.6, "water"), (0.65, 0.1, 0.8, 0.7, 0.6, "water"),
    (0.65, 0.3, 1, 0.69, 0.6, "water"), (0.65, 0.1, 0.7, 0.68, 0.6, "mud"),
    (0.65, 0.1, 0.5, 0.67, 0.6, "mud"),
)  # fmt: skip
_SPATTER_224 = (
    (0.65, 0.3, 4, 0.69, 0.6, "water"), (0.65, 0.3, 3, 0.68, 0.6, "water"),
    (0.65, 0.3, 2, 0.68, 0.5, "water"), (0.65, 0.3, 1, 0.65, 1.5, "mud"), (0.67, 0.4, 1, 0.65, 1.5, "mud"),
)  # fmt: skip

TABLES: Mapping[int, Mapping[str, Sequence[Any]]] = {
    32: {  # CIFAR-10-C
        "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),  # radius, sigma
        "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),  # share of the values
        "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # deviation, of values from 0 to 1
        "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),  # side of the reduced image
        "spatter": _SPATTER_32,
        "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # what is left of it
        "jpeg": (80, 65, 58, 50, 40),  # quality
    },
    64: {  # Tiny ImageNet-C
        "motion_blur": ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
        "impulse_noise": (0.01, 0.02, 0.05, 0.08, 0.14),
        "gaussian_noise": (0.04, 0.08, 0.12, 0.15, 0.18),
        "pixelate": (0.9, 0.8, 0.7, 0.6, 0.5),
        "spatter": _SPATTER_64,
        "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
        "jpeg": (65, 58, 50, 40, 25),
    },
    224: {  # ImageNet-C
        "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
        "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
        "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
        "spatter": _SPATTER_224,
        "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
        "jpeg": (25, 18, 15, 10, 7),
    },
}


def table_size(side: int) -> int:
    """The table for an image whose shorter side has so many pixels."""
    return min(TABLES, key=lambda size: abs(math.log(size / side)))


def setting(name: str, severity: int, side: int) -> Any:
    """The numbers of an image corruption at a severity, for an image of that shorter side."""
    return TABLES[table_size(side)][name][severity - 1]
