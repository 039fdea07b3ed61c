"""Tables of Markdown, read: two of one kind, of a page and of new records → one, so that nothing is lost."""

from __future__ import annotations

from collections.abc import Sequence

from results_compared import grid

Grid = list[list[str]]


def with_columns_of(new: str, old: str) -> str:
    """A text whose first table gets the columns that only the older one has, with the lines about them.

    Args:
        new, old: parts of a page, each with a table of the same rows.
    """
    mine, theirs = _grid(new), _grid(old)
    rows = {row[0]: row for row in theirs}
    if not mine or not theirs or [row[0] for row in mine] != [row[0] for row in theirs]:
        return new
    only = [number for number, name in enumerate(theirs[0]) if name not in mine[0]]
    both = [[*row, *(rows[row[0]][number] for number in only)] for row in mine]
    notes = [line for line in old.splitlines() if line.startswith(tuple(f"- {theirs[0][n]}: " for n in only))]
    return _replaced(new, both, notes)


def with_rows_of(new: str, old: str) -> str:
    """A text whose first table gets the rows that only the older one has, and what follows if nothing does.

    Args:
        new, old: parts of a page, each with a table of the same columns.
    """
    mine, theirs = _grid(new), _grid(old)
    if not mine or not theirs or mine[0] != theirs[0]:
        return new
    there = {row[0] for row in mine}
    rows = sorted([*mine[1:], *(row for row in theirs[1:] if row[0] not in there)], key=_place)
    text = _replaced(new, [mine[0], *rows])
    rest, others = _after(new), _after(old)
    return text if rest or not others else f"{text}\n\n{others}"


def column_of(text: str, name: str) -> dict[str, str]:
    """Cells of a column of the first table, by those of the first column; nothing without that column."""
    table = _grid(text)
    if not table or name not in table[0]:
        return {}
    place = table[0].index(name)
    return {row[0]: row[place] for row in table[1:]}


def _place(row: Sequence[str]) -> tuple[int, float]:
    """Penalties in their order, then the tasks' choice, then the other ways to train as they come."""
    label = row[0]
    if label.startswith("shared, penalty "):
        return 0, float(label.rsplit(" ", 1)[1])
    return (1 if label.startswith("shared") else 2), 0.0


def _grid(text: str) -> Grid:
    """Cells of the first table, without the line of dashes."""
    lines = _lines(text)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in (*lines[:1], *lines[2:])]


def _lines(text: str) -> list[str]:
    found: list[str] = []
    for line in text.splitlines():
        if line.startswith("|"):
            found.append(line)
        elif found:
            break
    return found


def _after(text: str) -> str:
    """What follows the first table."""
    table = "\n".join(_lines(text))
    return text.partition(table)[2].strip() if table else ""


def _replaced(text: str, cells: Grid, notes: Sequence[str] = ()) -> str:
    """The text with another table in the place of its first, and more notes above it."""
    before, own, after = text.partition("\n".join(_lines(text)))
    assert own
    notes = [note for note in notes if note not in before]
    told = "\n".join([before.rstrip(), *notes]) + "\n\n" if notes else before
    return f"{told}{grid(cells[0], cells[1:])}{after}"
