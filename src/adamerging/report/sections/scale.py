"""What becomes of a merge as more experts go in (the protocol of arXiv 2410.03617)."""

from __future__ import annotations

from typing import Any

from ...evaluation.records import Row
from ..aggregate import Spread, mean_accuracy, normalised, spread
from ..document import Chart, Column, Section, Table
from ..drawing import figure, label_ends, percents
from ..view import View
from .unseen import SUBSET

Curves = dict[str, dict[int, Spread]]


def scale(view: View) -> Section | None:
    """Held-in and held-out accuracy against the number of experts."""
    rows = [
        row for row in view.run.rows if (row.group or "").startswith(SUBSET) and row.scores and row.experts
    ]
    if not rows:
        return None
    relative = all(s.normalised is not None for row in rows for s in row.scores)
    held_in, held_out = _curves(rows, relative, False), _curves(rows, relative, True)
    shown = {"Merged tasks / expert": held_in, "Other tasks / base": held_out}
    if not relative:
        shown = {"Tasks that were merged": held_in, "Tasks that were not": held_out}
    shown = {title: curves for title, curves in shown.items() if curves}
    what = "Normalised accuracy" if relative else "Accuracy"
    chart = Chart(
        "scale",
        f"{what} of {len(held_in)} methods against the number of merged experts.",
        lambda: _draw(view, shown),
        [_table(f"{what}, %. {title}", curves) for title, curves in shown.items()],
        note="Lines: mean over random subsets of the experts and over seeds. Bands: one standard deviation.",
    )
    return Section("scale", "More experts in one model", [f"{what} as more experts are merged."], [chart])


def _curves(rows: list[Row], relative: bool, unseen: bool) -> Curves:
    measure = normalised if relative else mean_accuracy
    values: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        value = measure(row, unseen=unseen)
        if value is not None:
            values.setdefault(row.label, {}).setdefault(len(row.experts), []).append(value)
    return {
        label: {size: found for size in sorted(own) if (found := spread(own[size])) is not None}
        for label, own in values.items()
    }


def _table(caption: str, curves: Curves) -> Table:
    columns = [
        Column("method"),
        Column("experts"),
        Column("mean", "percent"),
        Column("std", "percent"),
        Column("models", "count"),
    ]
    rows = [[label, size, s.mean, s.std, s.count] for label, own in curves.items() for size, s in own.items()]
    return Table(caption, columns, rows)


def _draw(view: View, shown: dict[str, Curves]) -> Any:
    made, grid = figure(2.9, 1, len(shown), sharey=False, squeeze=False)
    for axes, (title, curves) in zip(grid.flat, shown.items(), strict=True):
        ends = []
        for label, own in curves.items():
            style, sizes = view.style(label), list(own)
            means = [own[size].mean for size in sizes]
            std = [own[size].std or 0.0 for size in sizes]
            axes.plot(
                sizes,
                means,
                color=style.color,
                ls=style.dash,
                lw=1.8,
                marker=style.marker,
                ms=4,
                clip_on=False,
            )
            axes.fill_between(
                sizes,
                [m - s for m, s in zip(means, std, strict=True)],
                [m + s for m, s in zip(means, std, strict=True)],
                color=style.color,
                alpha=0.13,
                lw=0,
            )
            ends.append((sizes[-1], means[-1], label, style.color))
        axes.set_title(title)
        axes.set_xlabel("experts merged")
        axes.grid(axis="y")
        percents(axes.yaxis)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlim(axes.get_xlim()[0], max(end[0] for end in ends))
        axes.set_ylim(*axes.get_ylim())
        label_ends(axes, ends)
    return made
