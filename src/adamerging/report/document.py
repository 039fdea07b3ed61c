"""What a report is made of: sections of charts, each with its data as a table. Knows no drawing library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..units import duration, size

Cell = str | int | float | None
Format = Literal["text", "percent", "number", "count", "seconds", "bytes"]
NONE = "–"


@dataclass(frozen=True)
class Column:
    """A column of a table, and how its numbers are written."""

    title: str
    format: Format = "text"


@dataclass(frozen=True)
class Table:
    """Numbers as they are in the records; how many digits are shown is the page's affair.

    Attributes:
        caption: what they are.
        columns: one a cell of each row.
        rows: the cells; None where there is no value.
    """

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Chart:
    """A picture and the numbers it shows.

    Attributes:
        name: of its file, without ending; unique in the report.
        alt: what it shows, for whoever does not see it.
        draw: makes the figure of the drawing library.
        tables: every number in it.
        title: above it; empty where the section's title says it all.
        note: below it: how to read it.
    """

    name: str
    alt: str
    draw: Callable[[], Any]
    tables: Sequence[Table]
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class Section:
    """One question and its answer.

    Attributes:
        anchor: its address in the page.
        title: what it is about.
        lead: the answer in plain words.
        charts: pictures with their tables.
        tables: tables without a picture.
        text: (title, preformatted text) pairs, such as a recipe.
    """

    anchor: str
    title: str
    lead: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    text: Sequence[tuple[str, str]] = field(default=())


def written(value: Cell, form: Format = "text") -> str:
    """A cell as the reader sees it."""
    if value is None:
        return NONE
    if isinstance(value, str):
        return value
    if form == "percent":
        return f"{100 * value:.1f}"
    if form == "count":
        return f"{value:,.0f}"
    if form == "seconds":
        return duration(value)
    if form == "bytes":
        return size(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def percent(value: float) -> str:
    """A share in running text: 97.3 %."""
    return f"{100 * value:.1f} %"


def short(text: str, limit: int = 26) -> str:
    """A name that fits beside a chart: one line, cut in the middle where it is long."""
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    head = (limit - 1) * 2 // 3
    return f"{text[:head]}…{text[head + 1 - limit :]}"


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names in running text; of many the first few."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
