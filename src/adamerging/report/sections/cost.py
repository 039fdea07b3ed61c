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
        [row.label, row.seed, row.seconds, row.memory, row.parameters] for line in lines for row in line.rows
    ]
    table = Table(
        "Time to merge or learn, scores excluded; peak private memory of the process by then",
        [
            Column("model"),
            Column("seed"),
            Column("time", "seconds"),
            Column("memory", "bytes"),
            Column("coefficients", "count"),
        ],
        rows,
    )
    able = [line for line in lines if line.kept(view.tasks) is not None and line.rows[0].seconds]
    if len(able) < 2:
        return Section("cost", "What it cost", tables=[table])
    chart = Chart(
        "cost",
        f"Share of the experts’ accuracy against the time to make each of {len(able)} models.",
        lambda: _draw(view, able),
        [table],
        narrow=True,
        note="Up and to the left is better. Time in seconds, on a logarithmic scale; first seed.",
    )
    return Section("cost", "What it cost", charts=[chart])


def _draw(view: View, lines: list[Line]) -> Any:
    made, axes = figure(3.3)
    axes.set_xscale("log")
    points = [
        (line, line.rows[0].seconds or 0.0, found.mean) for line in lines if (found := line.kept(view.tasks))
    ]
    for line, seconds, value in points:
        style = view.style(line.label)
        axes.plot(
            seconds,
            value,
            marker="o",
            ms=6,
            color=style.color,
            mfc=style.color if line.counts else PAPER,
            ls="",
        )
    axes.margins(x=0.3, y=0.12)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} s")
    axes.xaxis.set_minor_formatter(lambda *_: "")
    axes.grid(axis="both")
    percents(axes.yaxis)
    made.get_layout_engine().execute(made)  # settles where the points are
    places = axes.transData.transform([(seconds, value) for _, seconds, value in points]) * 72 / made.dpi
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    for (line, seconds, value), (x, y) in sorted(
        zip(points, places, strict=True), key=lambda item: -item[0][2]
    ):
        name = short(line.label)
        box, offset, side = _free_place(x, y, 4.9 * len(name), taken)
        taken.append(box)
        axes.annotate(
            name,
            (seconds, value),
            xytext=offset,
            textcoords="offset points",
            va="center",
            ha=side,
            color=INK if line is view.winner else SOFT,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": SOFT, "alpha": 0.6}
            if abs(offset[1]) > 12
            else None,
        )
    return made


Box = tuple[float, float, float, float]


def _free_place(x: float, y: float, width: float, taken: list[Box]) -> tuple[Box, tuple[float, float], str]:
    """The nearest place for a name beside a point (all in points) that covers nothing; else its right."""
    choices = [(dx, dy) for dy in (0, 10, -10, 20, -20, 30, -30, 40, -40) for dx in (8, -8)]
    boxes = [
        (
            (x + dx, y + dy - 5, x + dx + width, y + dy + 5)
            if dx > 0
            else (x + dx - width, y + dy - 5, x + dx, y + dy + 5)
        )
        for dx, dy in choices
    ]
    free = (n for n, box in enumerate(boxes) if not any(_overlap(box, other) for other in taken))
    best = next(free, 0)
    return boxes[best], choices[best], "left" if choices[best][0] > 0 else "right"


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
