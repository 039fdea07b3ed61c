"""Karcher mean: the centre of the experts on the sphere."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..errors import UsageError
from .gram import Of, combine
from .registry import register
from .stage import Method, Stream


@register(
    "karcher",
    paper="Karcher, Riemannian center of mass, 1977; for merging: arXiv 2603.04972",
    cost="two passes",
)
def karcher(
    of: Of = "weights",
    iterations: Annotated[int, Field(ge=1)] = 100,
    tolerance: Annotated[float, Field(gt=0)] = 1e-10,
) -> Method:
    """Spherical mean of any number of experts: direction by the Karcher mean, length by the mean norm.

    For two experts of equal length and weight this is slerp at t = 0.5. Experts of length zero are left out
    of both means.

    Args:
        of: average the weights themselves, or the task vectors.
        iterations: limit of the fixed-point iteration (it needs a handful).
        tolerance: stop when the mean of the tangent vectors is shorter.
    """

    def coefficients(products: Tensor, stream: Stream) -> list[float]:
        weights = stream.weights.double()
        if (weights < 0).any() or not weights.any():
            raise UsageError(f"karcher: weights must not be negative, nor all zero, got {weights.tolist()}")
        return spherical_mean(products, weights, iterations, tolerance).tolist()

    return Method("karcher", reduce=combine("karcher mean", of, coefficients))


def spherical_mean(products: Tensor, weights: Tensor, iterations: int, tolerance: float) -> Tensor:
    """Coefficients of the Karcher mean in terms of the vectors whose inner products are given.

    The mean m = Σ a_k u_k of unit vectors u_k stays in their span, so each step is taken in a:
    m ← cos‖t‖ · m + sin‖t‖ · t/‖t‖ with the tangent t = Σ w_k (θ_k / sin θ_k)(u_k − cos θ_k · m).

    Args:
        products: ``(K, K)`` float64 inner products.
        weights: ``(K,)`` float64, not negative, not all zero.

    Returns:
        ``(K,)`` float64; zero for vectors of zero length.
    """
    norms = products.diagonal().clamp_min(0).sqrt()
    present = (norms > 0) & (weights > 0)
    if not present.any():
        return torch.zeros_like(norms)
    weights = torch.where(present, weights, 0.0) / weights[present].sum()
    units = products / torch.where(present, norms, 1.0).outer(torch.where(present, norms, 1.0))
    mean = weights.clone()
    length = (mean @ units @ mean).sqrt()
    mean = mean / length if length > tolerance else present.double().cumsum(0).eq(1).double() * present
    for _ in range(iterations):
        cosines = (units @ mean).clamp(-1, 1)
        angles = torch.arccos(cosines)
        # Towards a vector that lies exactly opposite all ways are equally short: it pulls nowhere.
        ratio = torch.where(cosines > -1 + 1e-12, angles / torch.sin(angles), 0.0)
        pull = weights * torch.where(angles > 1e-12, ratio, 1.0)
        tangent = pull - (pull @ cosines) * mean
        size = (tangent @ units @ tangent).clamp_min(0).sqrt()
        if size < tolerance:
            break
        mean = torch.cos(size) * mean + torch.sin(size) * tangent / size
        mean = mean / (mean @ units @ mean).sqrt()
    return (weights @ norms) * mean / torch.where(present, norms, 1.0)
