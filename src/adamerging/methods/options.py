"""Option types that several methods share; pydantic checks them when a method is made."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from ..errors import UsageError
from ..schedule import check


def _within(low: float, high: float | None) -> AfterValidator:
    def validate(value: Any) -> Any:
        try:
            check(value, "the value", low=low, high=high)
        except UsageError as error:
            raise ValueError(str(error)) from None
        return value

    return AfterValidator(validate)


Fraction = Annotated[Any, _within(0.0, 1.0)]
"""A number in [0, 1], or a schedule of such numbers by expert, by name or over depth."""

Number = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0)]
