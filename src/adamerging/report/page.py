"""Records → one HTML page that needs nothing beside it."""

from __future__ import annotations


from dataclasses import dataclass
from typing import Any

from .document import Cell, Chart, Column, Table, written
from .drawing import inline, require_matplotlib, styled, svg
from .lines import MARKS, Line
from .load import Run
from .sections import sections
from .verdict import Verdict, verdict
from .view import View


@dataclass(frozen=True)
class Drawn:
    """A chart with its picture.

    Attributes:
        chart: the chart.
        figure: of the drawing library.
        svg: the SVG document.
    """

    chart: Chart
    figure: Any
    svg: str


@dataclass(frozen=True)
class Page:
    """A report, made.

    Attributes:
        html: the whole page.
        charts: its charts, in order.
        verdict: what it says on top.
    """

    html: str
    charts: tuple[Drawn, ...]
    verdict: Verdict


def make_page(run: Run) -> Page:
    """Draw a run's report.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_matplotlib()
    view = View(run)
    found = sections(view)
    drawn = {}
    for chart in (chart for section in found for chart in section.charts):
        made = styled(chart.draw)
        drawn[chart.name] = Drawn(chart, made, svg(made, chart.name))
    judged = verdict(view)
    html = _template().render(
        run=run,
        record=run.comparison,
        verdict=judged,
        sections=found,
        scores=_scores(view),
        others=_others(view),
        marks={mark: MARKS[mark] for mark in MARKS if any(mark in line.marks for line in view.lines)},
        pictures={name: inline(one.svg, name) for name, one in drawn.items()},
    )
    return Page(html, tuple(drawn.values()), judged)


@dataclass(frozen=True)
class ScoreCell:
    """One cell of the table of scores: the number, how deep its colour is (0 to 0.55), the exact value."""

    text: str
    heat: float
    value: float | None
    hint: str = ""


def _scores(view: View) -> dict[str, Any] | None:
    """The table models × tasks."""
    if not view.lines:
        return None
    rows = []
    for line in view.lines:
        cells = [_cell(line, task) for task in view.tasks]
        mean, kept = line.mean(view.tasks), line.kept(view.tasks)
        std = (mean.std if mean is not None else None) if len(line.rows) > 1 else None
        rows.append(
            {
                "line": line,
                "winner": line is view.winner,
                "cells": cells,
                "mean": mean.mean if mean else None,
                "std": std,
                "kept": kept.mean if kept else None,
            }
        )
    failed = {row.label: row.failed for row in view.run.rows if row.failed is not None and row.group is None}
    return {"tasks": view.tasks, "rows": rows, "failed": failed}


def _cell(line: Line, task: str) -> ScoreCell:
    found = line.accuracy(task)
    if found is None:
        return ScoreCell(written(None), 0.0, None)
    ratio = line.ratio(task)
    depth = min(1.0, max(0.0, ((found.mean if ratio is None else ratio) - 0.5) / 0.5))
    scores = [s for row in line.rows for s in row.scores if s.task == task and s.condition == "clean" and not s.unseen]
    hint = f"95 % interval {100 * scores[0].accuracy_low:.1f} to {100 * scores[0].accuracy_high:.1f}"
    hint += f", {scores[0].samples} samples" + (f"; {100 * ratio:.1f} % of the expert" if ratio is not None else "")
    return ScoreCell(written(found.mean, "percent"), round(0.5 * depth**1.5, 3), found.mean, hint)


def _others(view: View) -> list[Table]:
    """The numbers behind the table of scores: every score of every row, and experts on others' tasks."""
    columns = [
        Column("model"), Column("seed"), Column("task"), Column("accuracy", "percent"), Column("low", "percent"),
        Column("high", "percent"), Column("macro F1", "percent"), Column("ECE", "percent"), Column("NLL", "number"),
        Column("entropy", "number"), Column("kept", "percent"), Column("samples", "count"),
    ]  # fmt: skip
    rows: list[list[Cell]] = [
        [
            row.label, row.seed, s.task, s.accuracy, s.accuracy_low, s.accuracy_high, s.macro_f1, s.ece, s.nll, s.entropy,
            s.normalised, s.samples,
        ]
        for row in view.run.rows
        if row.group is None
        for s in row.scores
        if s.condition == "clean" and not s.unseen
    ]  # fmt: skip
    return [Table("Every score on clean data, with 95 % bootstrap intervals of accuracy", columns, rows)] if rows else []


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("adamerging.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["written"] = written
    return environment.get_template("report.html.j2")


