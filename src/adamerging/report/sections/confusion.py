"""What the merged model confuses that the expert does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..document import Chart, Column, Section, Table, short
from ..drawing import figure, named_axis, tint
from ..lines import Line
from ..view import View

MOST = 3
Counts = Sequence[Sequence[int]]


def confusion(view: View) -> Section | None:
    """Merged beside expert, of the best model, for the tasks on which it loses most."""
    found = _of_best(view)
    if found is None:
        return None
    line, by_task = found
    names = sorted((t for t in by_task if _sound(by_task[t])), key=lambda task: line.ratio(task) or 1.0)
    charts = [
        Chart(
            f"confusion-{number}",
            f"Confusion of the classes of {task}, {line.label} beside the expert.",
            lambda own=by_task[task]: _draw(line.label, own),  # type: ignore[misc]
            [_table(task, by_task[task])],
            title=f"{task}: {_most(by_task[task])}",
        )
        for number, task in enumerate(names[:MOST], 1)
    ]
    if not charts:
        return None
    lead = f"True classes against predicted ones, {line.label} beside each task’s expert, rows of 100 %."
    if len(names) > MOST:
        lead += f" Shown are the {MOST} tasks on which it keeps least; the others are in the records."
    return Section("confusion", "What is confused with what", [lead], charts)


def _of_best(view: View) -> tuple[Line, Mapping[str, Any]] | None:
    for line in view.by_quality():
        for row in line.rows:
            if row.why.get("confusion"):
                return line, row.why["confusion"]
    return None


def _sound(own: Mapping[str, Any]) -> bool:
    size = len(own.get("labels") or [])
    matrices = [own.get("merged") or [], own.get("expert") or []]
    return size > 0 and all(len(m) == size and all(len(row) == size for row in m) for m in matrices)


def _pairs(own: Mapping[str, Any]) -> list[tuple[int, int]]:
    size = range(len(own["labels"]))
    wrong = [(i, j) for i in size for j in size if i != j and own["merged"][i][j] > 0]
    return sorted(wrong, key=lambda p: own["expert"][p[0]][p[1]] - own["merged"][p[0]][p[1]])


def _most(own: Mapping[str, Any]) -> str:
    pairs = _pairs(own)
    if not pairs or own["merged"][pairs[0][0]][pairs[0][1]] <= own["expert"][pairs[0][0]][pairs[0][1]]:
        return "no confusion that the expert does not have"
    i, j = pairs[0]
    names = own["labels"]
    count = own["merged"][i][j]
    times = f"{count} time{'s' * (count != 1)}, {own['expert'][i][j]} by the expert"
    return f"“{short(names[i])}” taken for “{short(names[j])}” {times}"


def _table(task: str, own: Mapping[str, Any]) -> Table:
    names = own["labels"]
    size = range(len(names))
    rows = [
        [names[i], names[j], own["merged"][i][j], own["expert"][i][j]]
        for i in size
        for j in size
        if own["merged"][i][j] or own["expert"][i][j]
    ]
    return Table(
        f"{task}: test samples by true and predicted class, pairs that occur",
        [Column("true"), Column("predicted"), Column("merged", "count"), Column("expert", "count")],
        rows,
    )


def _shares(counts: Counts) -> list[list[float]]:
    return [[value / max(1, sum(row)) for value in row] for row in counts]


def _draw(label: str, own: Mapping[str, Any]) -> Any:
    from matplotlib.colors import PowerNorm

    names = own["labels"]
    made, grid = figure(max(1.9, 1.2 + 0.17 * len(names)), 1, 2, sharey=True)
    for axes, title, counts in ((grid[0], label, own["merged"]), (grid[1], "its expert", own["expert"])):
        shares = _shares(counts)
        picture = tint(axes, shares, 0, 1, "{:.0%}" if len(names) <= 6 else None)
        picture.set_norm(PowerNorm(0.5, 0, 1))  # so that few errors show beside many hits
        axes.set_title(title)
        axes.set_xlabel("predicted")
        named_axis(axes.xaxis, names)
        named_axis(axes.yaxis, names)
        axes.tick_params(axis="x", rotation=90 if len(names) > 4 else 0)
        axes.spines[:].set_visible(False)
    grid[0].set_ylabel("true")
    return made
