"""Weighted averaging of the experts' weights."""

from __future__ import annotations

from .registry import register
from .stage import Method


@register("weighted", paper="Wortsman et al., Model soups, 2022, arXiv 2203.05482")
def weighted(normalise: bool = True) -> Method:
    """Weighted mean of the experts' weights, base + Σ w τ / Σ w.

    Args:
        normalise: divide by the sum of the weights; without it the result is base + Σ w τ.
    """
    return Method("weighted", normalise=normalise)
