"""Simple averaging of the experts' weights."""

from __future__ import annotations

from .registry import register
from .stage import Method


@register("average", paper="Wortsman et al., Model soups, 2022, arXiv 2203.05482")
def average() -> Method:
    """Mean of the experts' weights, each counting the same."""
    return Method("average", normalise=True, weighted=False)
