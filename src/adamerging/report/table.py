"""Records → a table of models and tasks, for a terminal, Markdown and LaTeX. Draws, computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..evaluation.records import CLEAN
from ..units import duration
from .aggregate import Spread, normalised_interval, spread
from .lines import MARKS, Line, lines_of, seen_tasks, unseen_tasks
from .load import Run

SIGNS = {"val": "v", "oracle": "o", "labelled": "l", "transductive": "t"}
"""Behind a label, explained below the table."""
NARROW = 80
_LABEL = 24
_CELL = 7


@dataclass(frozen=True)
class Cells:
    """A table of text.

    Attributes:
        columns: headings; the first is the model.
        rows: cells of each model.
        notes: what the signs mean, failures, and what is missing.
        fixed: how many columns belong in front of every part of a table that is cut: the summary.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]
    fixed: int


def cells_of(run: Run, condition: str | None = None) -> Cells:
    """The table of a run: mean, share of the experts' accuracy with its interval, and each task, in percent.

    Args:
        run: its records.
        condition: a corruption and its severity; clean data when None.
    """
    tasks, unseen = seen_tasks(run), unseen_tasks(run)
    lines = lines_of(run)
    rows = [_row(line, tasks, unseen, condition) for line in lines]
    timed = any(row[4] for row in rows)
    columns = ["model", "mean", "of experts", "95 %", *(["time"] if timed else [])]
    rows = [row if timed else [*row[:4], *row[5:]] for row in rows]
    columns += [*tasks, *(f"{name} (unseen)" for name in unseen)]
    return Cells(columns, rows, [*_notes(lines), *_groups(run), *_failures(run)], 5 if timed else 4)


def in_parts(widths: Sequence[int], room: int) -> list[list[int]]:
    """The numbers of columns that stand side by side, part by part; one at least in each.

    Args:
        widths: of the columns, each with the space before it.
        room: what there is beside the column that every part begins with.
    """
    parts: list[list[int]] = []
    taken = 0
    for number, width in enumerate(widths):
        if not parts or taken + width > room:
            parts.append([])
            taken = 0
        parts[-1].append(number)
        taken += width
    return parts


def rich_table(cells: Cells, width: int, title: str = "Accuracy, %") -> Group:
    """The table for a terminal: as many tasks side by side as fit, the rest below.

    Args:
        cells: what to draw.
        width: columns of the terminal.
        title: above it.
    """
    label = min(_LABEL, max([len(row[0]) for row in cells.rows], default=0) or 5)
    summary = list(range(1, cells.fixed))
    tasks = list(range(cells.fixed, len(cells.columns)))
    wide = label + (_CELL + 5) * len(summary) + (_CELL + 1) * len(tasks) <= width
    parts = [summary + tasks] if wide else [summary]
    if not wide:
        beside = in_parts([_CELL + 1] * len(tasks), max(width, NARROW) - label - 1)
        parts += [[tasks[number] for number in part] for part in beside]
    tables: list[Table | Text] = []
    for number, part in enumerate(parts):
        table = Table(
            title=title if number == 0 else None, box=None, pad_edge=False, padding=(0, 1, 0, 0),
            title_justify="left", title_style="bold",
        )  # fmt: skip
        table.add_column(cells.columns[0], header_style="dim", max_width=label, overflow="fold")
        for column in part:
            table.add_column(
                Text(cells.columns[column]), justify="right", header_style="dim", overflow="fold",
                min_width=_CELL - 2, max_width=None if column < cells.fixed else _CELL,
            )  # fmt: skip
        for row in cells.rows:
            table.add_row(Text(row[0]), *(Text(row[column]) for column in part))
        tables += [Text(""), table] if number else [table]
    notes = [Text(note) for note in cells.notes]
    return Group(*tables, *([Text("")] if notes else []), *notes)


def markdown(cells: Cells) -> str:
    """The table as Markdown, the notes below."""
    lines = [cells.columns, ["---", *["---:"] * (len(cells.columns) - 1)], *cells.rows]
    head = [f"| {' | '.join(map(_pipe, line))} |" for line in lines]
    return "\n".join([*head, "", *(f"- {_pipe(note)}" for note in cells.notes)]).rstrip() + "\n"


def latex(cells: Cells) -> str:
    """The table as LaTeX (package booktabs), the notes below as comments."""
    body = [" & ".join(map(_tex, line)) + r" \\" for line in cells.rows]
    return "\n".join(
        [
            r"\begin{tabular}{l" + "r" * (len(cells.columns) - 1) + "}",
            r"\toprule",
            " & ".join(map(_tex, cells.columns)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            *(f"% {' '.join(note.split())}" for note in cells.notes),
            "",
        ]
    )


def _row(line: Line, tasks: Sequence[str], unseen: Sequence[str], condition: str | None) -> list[str]:
    under = CLEAN if condition is None else condition
    signs = "".join(SIGNS[mark] for mark in line.marks)
    intervals = [normalised_interval(row, under) for row in line.rows]
    low = spread(None if found is None else found[0] for found in intervals)
    high = spread(None if found is None else found[1] for found in intervals)
    seconds = spread(row.seconds for row in line.rows if line.merged)
    mean = line.mean(tasks) if condition is None else None
    kept = line.kept(tasks) if condition is None else None
    return [
        line.label + (f" [{signs}]" if signs else ""),
        _percent(mean),
        _percent(kept),
        f"{low.mean * 100:.1f}–{high.mean * 100:.1f}" if low and high and line.kind != "expert" else "",
        duration(seconds.mean) if seconds else "",
        *(_percent(line.accuracy(task, under), short=True) for task in tasks),
        *(_percent(line.accuracy(task, under, unseen=True), short=True) for task in unseen),
    ]


def _percent(found: Spread | None, *, short: bool = False) -> str:
    """A mean in percent, with its standard deviation over seeds where there are several."""
    if found is None:
        return "-"
    deviation = "" if found.std is None or short else f" ±{found.std * 100:.1f}"
    return f"{found.mean * 100:.1f}{deviation}"


def _notes(lines: Iterable[Line]) -> list[str]:
    """What the signs mean that stand in the table, and what ± is."""
    lines = list(lines)
    marks = dict.fromkeys(mark for line in lines for mark in line.marks)
    seeds = max((len(line.rows) for line in lines if line.merged), default=1)
    notes = [f"[{SIGNS[mark]}] {MARKS[mark]}" for mark in MARKS if mark in marks]
    return [*notes, *([f"± standard deviation over {seeds} seeds."] if seeds > 1 else [])]


def _groups(run: Run) -> list[str]:
    """That there are models of some of the experts, which the table does not show."""
    count = len({row.group for row in run.rows if row.group is not None})
    if not count:
        return []
    what = "1 split or subset" if count == 1 else f"{count} splits and subsets"
    return [f"Models of {what} of the experts are in the report, in --format csv and in --json."]


def _failures(run: Run) -> list[str]:
    """Rows without scores, each with its reason, and rows that are not there yet."""
    failed = dict.fromkeys(
        f"failed: {row.label}{'' if row.seed is None else f', seed {row.seed}'}"
        f"{'' if row.group is None else f' ({row.group})'}: {row.failed}"
        for row in run.rows
        if row.failed is not None
    )
    notes = list(failed)
    if run.missing:
        notes.append(f"{run.missing} of {run.comparison.planned} rows are not there yet.")
    return [*notes, *run.problems]


def _pipe(text: str) -> str:
    return " ".join(text.replace("|", r"\|").replace("<", "&lt;").split())


_TEX: dict[int, str] = {
    ord("\\"): r"\textbackslash{}", ord("~"): r"\textasciitilde{}", ord("^"): r"\textasciicircum{}",
    ord("±"): r"$\pm$", ord("–"): "--", **{ord(sign): f"\\{sign}" for sign in "&%$#_{}"},
}  # fmt: skip


def _tex(text: str) -> str:
    return text.translate(_TEX)


FORMATS: dict[str, Callable[[Cells], str]] = {"markdown": markdown, "latex": latex}
