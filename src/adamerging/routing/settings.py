"""Options of the models that route by input, as data alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..validation import make

_STRICT = ConfigDict(extra="forbid", strict=True)


class WemoeOptions(BaseModel):
    """Options of ``route: wemoe``."""

    model_config = _STRICT

    mlp: list[str] | None = Field(
        None,
        description="Patterns of the weights, by the base's names, of the linear maps that are routed; "
        "the feed-forward maps of every block when unset.",
    )
    hidden: int | None = Field(
        None, ge=1, description="Width of a router's hidden layer; that of its input when unset."
    )
    std: float = Field(0.01, ge=0, description="Standard deviation of a router's first weights.")


class TwinOptions(BaseModel):
    """Options of ``route: twin``."""

    model_config = _STRICT

    maps: list[str] | None = Field(
        None,
        description="Patterns of the weights, by the base's names, of the linear maps that are routed; all "
        "those of the blocks when unset.",
    )
    rank: float = Field(
        0.1, gt=0, le=1, description="Fraction of the directions of a difference that is kept."
    )
    hidden: int | None = Field(
        None, ge=1, description="Width of the router's hidden layer; that of its input when unset."
    )
    std: float = Field(0.01, ge=0, description="Standard deviation of the router's first weights.")


OPTIONS: Mapping[str, type[BaseModel]] = {"wemoe": WemoeOptions, "twin": TwinOptions}

TITLES: Mapping[str, str] = {"wemoe": "WEMoE", "twin": "Twin-Merging"}
"""What the papers call them."""


def route_options(route: str, given: Mapping[str, Any]) -> Any:
    """The options of a way to route.

    Raises:
        UsageError: unknown options, or values that cannot be right; all at once.
    """
    return make(OPTIONS[route], given, "adapt.route_options")
