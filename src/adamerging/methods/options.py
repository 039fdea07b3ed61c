"""Option types that several methods share; pydantic checks them when a method is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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


def numbers(schedule: Any) -> Iterator[float]:
    """Every number in a schedule that was checked already; between two of a gradient lie all others."""
    if isinstance(schedule, (int, float)):
        yield float(schedule)
    elif isinstance(schedule, Mapping):
        for value in [schedule["value"]] if "value" in schedule else schedule.values():
            yield from numbers(value)
    else:
        for item in schedule:
            yield from numbers(item)


NotNegative = Annotated[Any, _within(0.0, None)]
"""A number that is at least 0, or a schedule of such numbers by expert, by name or over depth."""

Number = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0)]
