"""Whether low entropy goes with low loss: the argument for the objective (arXiv 2310.02575)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..document import Chart, Column, Section, Table, short
from ..drawing import SERIES, SOFT, figure
from ..lines import Line
from ..view import View

MOST = 8


def entropy(view: View) -> Section | None:
    """A small scatter plot a task, of the best model that was looked into."""
    found = _of_best(view)
    if found is None:
        return None
    line, by_task = found
    names = list(by_task)
    rows: list[list[Any]] = []
    for other in view.lines:
        row = next((row for row in other.rows if row.why.get("entropy_loss")), None)
        for task, own in (row.why["entropy_loss"] if row is not None else {}).items():
            rows.append([other.label, task, own.get("spearman"), own.get("pearson")])
    bins = [
        [task, part.get("entropy"), part.get("loss"), part.get("samples")]
        for task in names
        for part in by_task[task].get("bins", [])
    ]
    tables = [
        Table(
            "Correlation of entropy and loss over test samples",
            [Column("model"), Column("task"), Column("Spearman", "number"), Column("Pearson", "number")],
            rows,
        ),
        Table(
            f"{line.label}: test samples in groups of like entropy (nats)",
            [
                Column("task"),
                Column("entropy", "number"),
                Column("loss", "number"),
                Column("samples", "count"),
            ],
            bins,
        ),
    ]
    known = {t: o["spearman"] for t, o in by_task.items() if isinstance(o.get("spearman"), (int, float))}
    lead = []
    if known:
        low = min(known, key=lambda task: known[task])
        mean = sum(known.values()) / len(known)
        lead = [
            f"For {line.label} the rank correlation of entropy and true loss is {mean:.2f} in the "
            f"mean over {len(known)} "
            f"tasks, lowest on {low} ({known[low]:.2f}). The higher it is, the better entropy "
            "stands in for the labels "
            "that adaptation does not have."
        ]
    shown = names[:MOST]
    chart = Chart(
        "entropy",
        f"Loss against entropy of test samples for {len(shown)} tasks; both rise together.",
        lambda: _draw({task: by_task[task] for task in shown}),
        tables,
        note="Dots: test samples"
        + (f" of the first {MOST} tasks" if len(names) > MOST else "")
        + ". Line: means of groups of like entropy. ρ: Spearman’s rank correlation.",
    )
    return Section("entropy", "Is confident also right?", lead, [chart])


def _of_best(view: View) -> tuple[Line, Mapping[str, Any]] | None:
    for line in [*view.by_quality(), *view.lines]:
        for row in line.rows:
            if row.why.get("entropy_loss"):
                return line, row.why["entropy_loss"]
    return None


def _draw(by_task: Mapping[str, Any]) -> Any:
    columns = min(4, len(by_task))
    rows = math.ceil(len(by_task) / columns)
    made, grid = figure(0.4 + 1.55 * rows, rows, columns, squeeze=False)
    for axes, (task, own) in zip(grid.flat, by_task.items(), strict=False):
        points = own.get("points") or []
        if points:
            axes.plot(*zip(*points, strict=True), ls="", marker=".", ms=3, mew=0, color=SOFT, alpha=0.5)
        bins = own.get("bins") or []
        axes.plot([b["entropy"] for b in bins], [b["loss"] for b in bins], color=SERIES[0], lw=1.8)
        rho = own.get("spearman")
        axes.set_title(short(task, 18), pad=14)
        axes.annotate(
            "" if rho is None else f"ρ = {rho:.2f}",
            (0, 1),
            xycoords="axes fraction",
            xytext=(0, 4),
            textcoords="offset points",
            color=SERIES[0],
        )
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    for axes in list(grid.flat)[len(by_task) :]:
        axes.set_visible(False)
    made.supxlabel("entropy, nats", fontsize=8.5, color=SOFT)
    made.supylabel("loss, nats", fontsize=8.5, color=SOFT)
    return made
