"""How much of the experts' accuracy each model keeps."""

from __future__ import annotations

from typing import Any

from ..aggregate import normalised, normalised_interval
from ..document import Chart, Column, Section, Table, short
from ..drawing import INK, PAPER, SOFT, figure, percents
from ..lines import Line
from ..view import View


def kept(view: View) -> Section | None:
    """A dot a model with its interval, seeds beside it."""
    lines = [line for line in view.lines if line.kind != "expert" and line.kept(view.tasks) is not None]
    if not lines:
        return None
    lines = sorted(lines, key=lambda line: _value(view, line))
    rows = []
    for line in reversed(lines):
        for row in line.rows:
            interval = normalised_interval(row) or (None, None)
            rows.append([line.label, row.seed, normalised(row, tasks=view.tasks), *interval])
    table = Table(
        "Normalised accuracy: mean over the tasks of accuracy / the expert’s",
        [Column("model"), Column("seed"), Column("kept, %", "percent"), Column("low", "percent"), Column("high", "percent")],
        rows,
    )  # fmt: skip
    top, bottom = lines[-1], lines[0]
    chart = Chart(
        "kept",
        f"Share of the experts’ accuracy that each of {len(lines)} models keeps; {top.label} most, "
        f"{bottom.label} least.",
        lambda: _draw(view, lines),
        [table],
        note="Dot: mean over seeds. Line: 95 % interval from the size of the test data (first seed; the tasks’ bootstrap "
        "intervals, the experts taken as exact). Small ticks: single seeds.",
    )
    return Section(
        "kept",
        "How much of the experts is kept",
        ["One hundred per cent is a model as good on every task as the expert made for that task."],
        [chart],
    )


def _value(view: View, line: Line) -> float:
    found = line.kept(view.tasks)
    assert found is not None
    return found.mean


def _draw(view: View, lines: list[Line]) -> Any:
    made, axes = figure(0.55 + 0.25 * len(lines))
    axes.axvline(1.0, color=INK, lw=1, ls=(0, (4, 2)))
    axes.annotate("experts", (1.0, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3), ha="center",
                  textcoords="offset points", color=INK, annotation_clip=False)  # fmt: skip
    for place, line in enumerate(lines):
        style, value = view.style(line.label), _value(view, line)
        interval = normalised_interval(line.rows[0])
        if interval is not None:
            axes.plot(interval, [place, place], color=style.color, lw=1.6, alpha=0.55)
        if len(line.rows) > 1:
            seeds = [normalised(row, tasks=view.tasks) for row in line.rows]
            axes.plot(seeds, [place] * len(seeds), ls="", marker="|", ms=9, mew=1, color=style.color)
        hollow = not line.counts
        axes.plot(
            value, place, marker="o", ms=6, color=style.color, mfc=PAPER if hollow else style.color, mew=1.4,
            gid=f"kept {place}",
        )  # fmt: skip
        axes.annotate(f"{100 * value:.1f}", (1.01, place), xycoords=("axes fraction", "data"), va="center",
                      color=INK if line is view.winner else SOFT, annotation_clip=False,
                      weight="bold" if line is view.winner else "normal")  # fmt: skip
    marked = {"oracle": " (oracle)", "labelled": " (labelled)"}
    names = [
        short(line.label, 30) + "".join(text for mark, text in marked.items() if mark in line.marks and mark not in line.label)
        for line in lines
    ]  # fmt: skip
    axes.set_yticks(range(len(lines)), names)
    axes.set_ylim(-0.6, len(lines) - 0.4)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    percents(axes.xaxis)
    return made
