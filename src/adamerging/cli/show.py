"""What the commands print: tables, sizes, messages. Knows nothing of merging."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..units import count as count
from ..units import duration as duration
from ..units import size as size

WIDE = 200
"""Columns where there is no terminal that would say how many it has: a program reads, nothing need fit."""


class _Console(Console):
    """A console that lets a broken pipe be what it is."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console(stderr: bool = False) -> Console:
    """Where to print; made when needed, since tests and pipes replace the streams."""
    stream = sys.stderr if stderr else sys.stdout
    wide = not stream.isatty() and "COLUMNS" not in os.environ
    return _Console(stderr=stderr, highlight=False, markup=False, width=WIDE if wide else None)


def complain(message: str) -> None:
    """An error, on standard error."""
    _labelled("error", "bold red", message)


def warn(message: str) -> None:
    """A warning, on standard error."""
    _labelled("warning", "bold yellow", message)


def note(message: str) -> None:
    """Something worth knowing, on standard error."""
    _labelled("note", "bold cyan", message)


def _labelled(label: str, style: str, message: str) -> None:
    console(stderr=True).print(Text.assemble((f"{label}: ", style), message), soft_wrap=True)


def print_json(document: Any) -> None:
    """One JSON document, and nothing else, on standard output."""
    print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False, default=str))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table without lines. A column whose name begins with ``>`` is aligned right."""
    result = Table(
        title=title or None,
        show_header=any(columns),
        box=None,
        pad_edge=False,
        title_justify="left",
        title_style="bold",
    )
    for column in columns:
        right = column.startswith(">")
        result.add_column(
            column.removeprefix(">"),
            justify="right" if right else "left",
            header_style="dim",
            no_wrap=right,
            overflow="fold",
        )
    for row in rows:
        result.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return result
