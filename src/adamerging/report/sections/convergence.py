"""What learning did, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...evaluation.records import Row
from ..document import Chart, Column, Section, Table
from ..drawing import figure, label_ends, percents
from ..view import View

MOST = 6
Curve = list[tuple[int, float]]


def convergence(view: View) -> Section | None:
    """Held-out entropy, and accuracy or else agreement with the experts, over the same steps."""
    labels = [line.label for line in view.by_quality() if view.first(line.label, "history")][:MOST]
    rows = [row for line in view.lines if line.label in labels for row in line.rows if row.history]
    measure = next((m for m in ("accuracy", "agreement") if any(_curve(row, m) for row in rows)), None)
    shown = {"entropy": "Entropy of the predictions, nats"}
    if measure is not None:
        shown[measure] = {
            "accuracy": "Accuracy on held-out samples", "agreement": "Agreement with the experts",
        }[measure]  # fmt: skip
    rows = [row for row in rows if any(len(_curve(row, name)) > 1 for name in shown)]
    if not rows:
        return None
    cells: list[list[Any]] = []
    for row in rows:
        curves = [dict(_curve(row, name)) for name in shown]
        steps = sorted({step for curve in curves for step in curve})
        cells.extend([row.label, row.seed, step, *(curve.get(step) for curve in curves)] for step in steps)
    formats = ["number", *(["percent"] if measure is not None else [])]
    columns = [Column("model"), Column("seed"), Column("step", "count")]
    columns += [Column(n if f == "number" else f"{n}, %", f) for n, f in zip(shown, formats, strict=True)]  # type: ignore[arg-type]
    table = Table("Mean over the tasks, on samples held out from learning", columns, cells)
    chart = Chart(
        "convergence", f"{' and '.join(shown)} of {len(labels)} learned models against the steps of learning.",
        lambda: _draw(view, rows, shown), [table],
        note="Mean over the tasks, on adaptation samples held out from learning. Thin lines: further seeds.",
    )  # fmt: skip
    return Section("convergence", "What learning did", _lead(rows, measure), [chart])


def _lead(rows: Sequence[Row], measure: str | None) -> list[str]:
    if measure is None:
        return []
    lost = []
    for row in rows:
        entropy, other = _curve(row, "entropy"), _curve(row, measure)
        if entropy and other and entropy[-1][1] < entropy[0][1] and other[-1][1] < other[0][1] - 0.005:
            lost.append(row.label)
    if lost:
        names = ", ".join(dict.fromkeys(lost))
        return [f"For {names}, entropy fell while {measure} fell too: more confident is not more right there."]
    return [f"Where entropy falls and {measure} rises with it, the objective does its work."]


def _curve(row: Row, name: str) -> Curve:
    """(step, mean over tasks) of the checks that know it."""
    found = []
    for record in row.history:
        checks = record.get("check")
        if not isinstance(checks, Mapping) or not isinstance(record.get("step"), int):
            continue
        values = [check[name] for check in checks.values() if isinstance(check, Mapping) and name in check]
        if values and len(values) == len(checks) and all(isinstance(v, (int, float)) for v in values):
            found.append((record["step"], sum(values) / len(values)))
    return found


def _draw(view: View, rows: Sequence[Row], shown: Mapping[str, str]) -> Any:
    made, grid = figure(0.4 + 1.9 * len(shown), len(shown), 1, sharex=True, squeeze=False)
    for axes, (name, title) in zip(grid.flat, shown.items(), strict=True):
        ends, named = [], set()
        for row in rows:
            curve, style = _curve(row, name), view.style(row.label)
            if not curve:
                continue
            first = row.label not in named
            axes.plot(*zip(*curve, strict=True), color=style.color, lw=1.8 if first else 0.8, alpha=1 if first else 0.5,
                      marker=style.marker if first else None, ms=3.5)  # fmt: skip
            if first:
                ends.append((*curve[-1], row.label, style.color))
            named.add(row.label)
        axes.set_title(title)
        axes.grid(axis="y")
        if name != "entropy":
            percents(axes.yaxis)
        axes.set_xlim(0, max((end[0] for end in ends), default=1) or 1)
        axes.set_ylim(*axes.get_ylim())
        label_ends(axes, ends)
    grid.flat[-1].set_xlabel("step")
    return made
