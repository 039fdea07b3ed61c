"""Accuracy as the inputs get worse."""

from __future__ import annotations

import math
from typing import Any

from ...evaluation.records import Row
from ..aggregate import by_severity, corruptions
from ..document import Chart, Column, Section, Table, percent
from ..drawing import figure, label_ends, percents
from ..view import View


def shift(view: View) -> Section | None:
    """The mean over corruptions, and one small chart for each."""
    rows = [row for line in view.lines for row in line.rows]
    found = corruptions(rows)
    if not found:
        return None
    mean = by_severity(rows)
    own = {name: by_severity(rows, name) for name in found}
    charts = [
        Chart(
            "shift",
            f"Mean accuracy of {len(mean)} models, clean to severity {max(map(max, found.values()))}.",
            lambda: _draw_mean(view, mean),
            [_table("Mean over the corruptions, %", mean)],
            narrow=True,
            note="Clean data is that of the same tasks.",
        )
    ]
    if len(found) > 1:
        charts.append(
            Chart(
                "shift-each",
                f"The same for each of {len(found)} corruptions: {', '.join(found)}.",
                lambda: _draw_each(view, own),
                [_table(f"{name}, %", values) for name, values in own.items()],
                title="Each corruption",
                note="Colours as above; the unnamed methods in grey.",
            )
        )
    return Section("shift", "When inputs get worse", _lead(view, rows, mean), charts)


def _lead(view: View, rows: list[Row], mean: dict[str, dict[int, float]]) -> list[str]:
    winner = view.winner
    if winner is None or winner.label not in mean:
        return []
    last = max(mean[winner.label])
    alive = {label: values for label, values in mean.items() if last in values}
    if last not in mean[winner.label] or 0 not in mean[winner.label]:
        return []
    text = (
        f"{winner.label} goes from {percent(mean[winner.label][0])} on clean inputs to "
        f"{percent(mean[winner.label][last])} at severity {last}"
    )
    experts = alive.get("experts")
    return [
        text
        + (
            f"; the experts from {percent(experts[0])} to {percent(experts[last])}."
            if experts and 0 in experts
            else "."
        )
    ]


def _table(caption: str, values: dict[str, dict[int, float]]) -> Table:
    levels = sorted({level for own in values.values() for level in own})
    columns = [
        Column("model"),
        *(Column("clean" if not level else str(level), "percent") for level in levels),
    ]
    return Table(
        caption, columns, [[label, *(own.get(level) for level in levels)] for label, own in values.items()]
    )


def _lines(
    view: View, axes: Any, values: dict[str, dict[int, float]], thin: float = 1.0
) -> list[tuple[float, float, str, str]]:
    ends: list[tuple[float, float, str, str]] = []
    for label, own in values.items():
        style = view.style(label)
        if not style.strong:
            axes.plot(list(own), list(own.values()), color=style.color, lw=0.8, alpha=0.45, zorder=1)
            continue
        axes.plot(
            list(own),
            list(own.values()),
            color=style.color,
            ls=style.dash,
            lw=style.width * thin,
            marker=style.marker,
            ms=3.5,
            zorder=3,
            clip_on=False,
        )
        ends.append((max(own), own[max(own)], label, style.color))
    return ends


def _draw_mean(view: View, values: dict[str, dict[int, float]]) -> Any:
    made, axes = figure(3.3)
    ends = _lines(view, axes, values)
    axes.set_xlabel("severity")
    axes.grid(axis="y")
    percents(axes.yaxis)
    axes.set_xlim(
        left=min(min(own) for own in values.values()), right=max(end[0] for end in ends) if ends else None
    )
    _severities(axes, values)
    axes.set_ylim(*axes.get_ylim())
    label_ends(axes, ends)
    return made


def _severities(axes: Any, values: dict[str, dict[int, float]]) -> None:
    """Marks where something was measured."""
    levels = sorted({level for own in values.values() for level in own})
    axes.set_xticks(levels, ["clean" if level == 0 else str(level) for level in levels])


def _draw_each(view: View, values: dict[str, dict[str, dict[int, float]]]) -> Any:
    columns = min(4, len(values))
    rows = math.ceil(len(values) / columns)
    made, grid = figure(0.3 + 1.5 * rows, rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (name, own) in zip(grid.flat, values.items(), strict=False):
        _lines(view, axes, own, 0.75)
        axes.set_title(name.replace("_", " "))
        axes.grid(axis="y")
        percents(axes.yaxis)
        _severities(axes, own)
    for axes in list(grid.flat)[len(values) :]:
        axes.set_visible(False)
    return made
