"""What each model cost to make."""

from __future__ import annotations

from typing import Any

from ..document import Chart, Column, Section, Table, short
from ..drawing import INK, PAPER, SOFT, figure, percents
from ..lines import Line
from ..view import View


def cost(view: View) -> Section | None:
    """Time against what is kept."""
    lines = [line for line in view.lines if line.merged and line.rows[0].seconds is not None]
    if not lines:
        return None
    rows = [
        [row.label, row.seed, row.seconds, row.memory, row.parameters]
        for line in lines
        for row in line.rows
    ]
    table = Table(
        "Time to merge or learn, scores excluded; peak private memory of the process by then",
        [Column("model"), Column("seed"), Column("time", "seconds"), Column("memory", "bytes"), Column("coefficients", "count")],
        rows,
    )
    able = [line for line in lines if line.kept(view.tasks) is not None and line.rows[0].seconds]
    if len(able) < 2:
        return Section("cost", "What it cost", tables=[table])
    chart = Chart(
        "cost", f"Share of the experts’ accuracy against the time to make each of {len(able)} models.",
        lambda: _draw(view, able), [table], note="Up and to the left is better. Time in seconds, on a logarithmic scale; first seed.",
    )  # fmt: skip
    return Section("cost", "What it cost", charts=[chart])


def _draw(view: View, lines: list[Line]) -> Any:
    made, axes = figure(3.3)
    axes.set_xscale("log")
    points = [(line, line.rows[0].seconds or 0.0, found.mean) for line in lines if (found := line.kept(view.tasks))]
    for line, seconds, value in points:
        style = view.style(line.label)
        axes.plot(seconds, value, marker="o", ms=6, color=style.color, mfc=style.color if line.counts else PAPER, ls="")
    low, high = axes.get_ylim()
    taken: list[tuple[float, float]] = []
    import math

    for line, seconds, value in sorted(points, key=lambda point: -point[2]):
        place = value
        while any(abs(math.log10(seconds / x)) < 0.55 and abs(place - y) < (high - low) * 0.05 for x, y in taken):
            place -= (high - low) * 0.012
        taken.append((seconds, place))
        axes.annotate(
            short(line.label), (seconds, place), xytext=(7, 0), textcoords="offset points", va="center",
            color=INK if line is view.winner else SOFT, annotation_clip=False,
        )  # fmt: skip
    axes.margins(x=0.12)
    axes.set_xlabel("seconds")
    axes.grid(axis="both")
    percents(axes.yaxis)
    left, right = axes.get_xlim()
    axes.set_xlim(left, right * 2.2)
    return made
