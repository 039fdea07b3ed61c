"""A run's folder → its records, with whatever is wrong said and the rest kept."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import UsageError
from ..evaluation.records import FORMAT, Comparison, Row

RECORD = "comparison.json"
ROWS = "rows"
_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufffe\uffff"


@dataclass(frozen=True)
class Run:
    """What is known of a run.

    Attributes:
        comparison: with every row that could be read.
        problems: sentences about record files that could not.
    """

    comparison: Comparison
    problems: tuple[str, ...] = ()

    @property
    def rows(self) -> list[Row]:
        """The rows, in the order they were made."""
        return self.comparison.rows

    @property
    def missing(self) -> int:
        """Rows that were asked for and are not there."""
        return max(0, self.comparison.planned - len(self.rows))


def load_run(folder: str | Path) -> Run:
    """Read a run's folder, as `compare` writes it, finished or not.

    The rows are those that ``comparison.json`` lists, in its order; files that an earlier run left are not
    looked at. A row's file that cannot be read is left out and named in `Run.problems`: the others are as
    good as ever. Without a readable ``comparison.json`` there is nothing to compare with, and it is an error.

    Args:
        folder: with ``comparison.json`` and ``rows/``; or the file itself.

    Raises:
        UsageError: no such folder, no run, or a ``comparison.json`` that cannot be read.
    """
    folder = Path(folder)
    if folder.name == RECORD and folder.is_file():
        folder = folder.parent
    if not folder.exists():
        raise UsageError(f"there is no folder {shown(folder)}; give the folder that `compare` wrote")
    file = folder / RECORD
    if not file.is_file():
        raise UsageError(
            f"{shown(folder)} is not the folder of a comparison: it holds no {RECORD}. Give the folder that "
            "`adamerging compare ... --out` wrote"
        )
    try:
        comparison = Comparison.model_validate(_read(file))
    except (ValueError, OSError) as error:
        raise UsageError(
            f"{shown(file)} cannot be read: {_reason(error)}. Run the same comparison again: "
            "it writes the file "
            "anew, and rows that are there are not computed again"
        ) from None
    problems = []
    seen = {_identity(row) for row in comparison.rows}
    for path in _files(folder / ROWS, comparison.order):
        try:
            row = Row.model_validate(_read(path))
        except (ValueError, OSError) as error:
            problems.append(
                f"{shown(path)} cannot be read and its row is left out: {_reason(error)}. "
                "Delete the file and run the "
                "same comparison again, which computes this row anew"
            )
            continue
        if _identity(row) not in seen:
            comparison.rows.append(row)
            seen.add(_identity(row))
    return Run(comparison, tuple(problems))


def _files(folder: Path, order: Sequence[str]) -> list[Path]:
    """The rows' files in the run's order, without those of an earlier one; all by name without an order."""
    if not order:
        return sorted(folder.glob("*.json"))
    files = (folder / f"{name}.json" for name in order if Path(name).name == name)
    return [path for path in files if path.is_file()]


def shown(path: str | Path) -> str:
    """A path as text that can be printed and written whatever bytes its name is made of."""
    return printable(os.fsencode(path).decode("utf-8", "backslashreplace"))


def printable(text: str) -> str:
    """Text that every file can hold and that shows what it is.

    Lone surrogates and control characters, which UTF-8 or XML cannot hold, and marks that turn the
    direction of the text after them become escapes.
    """
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(f"\\u{ord(c):04x}" if c not in "\n\t" and _hidden(c) else c for c in text)


def _hidden(character: str) -> bool:
    return unicodedata.category(character) == "Cc" or character in _DIRECTIONS


def _identity(row: Row) -> tuple[str, int | None, str | None]:
    return row.label, row.seed, row.group


def _read(path: Path) -> Any:
    try:
        fields = json.loads(path.read_bytes(), parse_constant=lambda _: None)  # no NaN, no infinity
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError("it must hold one JSON object")
    written = fields.get("format", FORMAT)
    if isinstance(written, int) and written > FORMAT:
        raise ValueError(f"it has format {written}, and this version reads {FORMAT}; upgrade adamerging")
    return _clean(fields)


def _clean(value: Any) -> Any:
    """The same with every text printable."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {printable(key): _clean(item) for key, item in value.items()}
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        return f"{where}: {first['msg']}{more}"
    if isinstance(error, json.JSONDecodeError):
        return f"it is no JSON (line {error.lineno}: {error.msg}), perhaps cut short"
    if isinstance(error, UnicodeDecodeError):
        return "it is no UTF-8 text"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)
