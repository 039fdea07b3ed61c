"""Tasks that no expert saw."""

from __future__ import annotations

from typing import Any

from ...evaluation.records import Row
from ..aggregate import Spread, mean_accuracy, seed_groups, spread
from ..document import Chart, Column, Section, Table, percent, short
from ..drawing import INK, RULE, SOFT, figure, percents
from ..view import View

SUBSET = "subset"


def unseen(view: View) -> Section | None:
    """Accuracy under a head that was fitted once on the base's features."""
    lines = [line for line in view.lines if line.mean(unseen=True) is not None]
    if not lines or not view.unseen:
        return None
    cells = {line.label: [_mean(line.accuracy(task, unseen=True)) for task in view.unseen] for line in lines}
    means = {line.label: _mean(line.mean(unseen=True)) for line in lines}
    order = sorted(means, key=lambda label: means[label] or 0.0)
    table = Table(
        "Accuracy on tasks that no expert saw, %",
        [Column("model"), *(Column(task, "percent") for task in view.unseen), Column("mean", "percent")],
        [[label, *cells[label], means[label]] for label in reversed(order)],
    )
    base = next((means[line.label] for line in lines if line.kind == "base"), None)
    first = order[-1]
    lead = [f"Best is {first} with {percent(means[first] or 0.0)} mean accuracy"]
    lead[0] += f"; the base has {percent(base)}." if base is not None and first != "base" else "."
    chart = Chart(
        "unseen",
        f"Mean accuracy on {len(view.unseen)} unseen tasks by model.",
        lambda: _draw(view, order, cells, means),
        [table],
        narrow=True,
        note="Dot: mean over the tasks. Ticks: single tasks. Every model answers under the same head, fitted "
        "once on the "
        "base’s features.",
    )
    return Section("unseen", "Tasks that no expert saw", lead, [chart])


def leave_out(view: View) -> Section | None:
    """Splits that leave some tasks out of the merge: those merged beside those left out."""
    rows = [row for row in view.run.rows if row.group and not row.group.startswith(SUBSET) and row.scores]
    if not rows:
        return None
    groups = list(dict.fromkeys(row.group or "" for row in rows))
    cells: list[list[Any]] = []
    for label, own in seed_groups(rows).items():
        cells.extend([label, group, *_pair([row for row in own if row.group == group])] for group in groups)
        if len(groups) > 1:
            cells.append([label, "mean over the splits", *_pair(own)])
    table = Table(
        "Mean accuracy by split, %",
        [
            Column("model"),
            Column("split"),
            Column("merged tasks", "percent"),
            Column("left-out tasks", "percent"),
        ],
        [row for row in cells if row[2] is not None or row[3] is not None],
    )
    return Section(
        "leave-out",
        "With tasks left out of the merge",
        [
            f"Each model was made anew for {len(groups)} split{'s' * (len(groups) != 1)}, "
            "without the experts of the tasks left out."
        ],
        tables=[table],
    )


def _pair(rows: list[Row]) -> tuple[float | None, float | None]:
    return _mean(spread(map(mean_accuracy, rows))), _mean(
        spread(mean_accuracy(row, unseen=True) for row in rows)
    )


def _mean(found: Spread | None) -> float | None:
    return found.mean if found is not None else None


def _draw(
    view: View, order: list[str], cells: dict[str, list[float | None]], means: dict[str, float | None]
) -> Any:
    made, axes = figure(0.5 + 0.25 * len(order))
    for place, label in enumerate(order):
        style = view.style(label)
        singles = [value for value in cells[label] if value is not None]
        axes.plot([min(singles), max(singles)], [place] * 2, color=RULE, lw=1, zorder=1)
        axes.plot(singles, [place] * len(singles), ls="", marker="|", ms=7, color=style.color, alpha=0.8)
        axes.plot(means[label], place, marker="o", ms=6, color=style.color)
        value = means[label]
        assert value is not None
        axes.annotate(
            f"{100 * value:.1f}",
            (1.01, place),
            xycoords=("axes fraction", "data"),
            va="center",
            color=INK if place == len(order) - 1 else SOFT,
            annotation_clip=False,
        )
    axes.set_yticks(range(len(order)), [short(label, 30) for label in order])
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    percents(axes.xaxis)
    return made
