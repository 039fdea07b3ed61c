"""How the experts' task vectors lie to each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..document import Chart, Column, Section, Table
from ..drawing import figure, heat, named_axis, write_cells
from ..view import View

Matrix = list[list[float | None]]


def geometry(view: View) -> Section | None:
    """Cosines and sign conflicts of every two, side by side."""
    found = view.comparison.geometry
    if not found or not _sound(found) or len(found["tasks"]) < 2:
        return None
    tasks = found["tasks"]
    shown = {
        title: _without_diagonal(found[name])
        for name, title in (("cosines", "Cosine"), ("sign_conflicts", "Sign conflicts"))
        if name in found
    }
    pairs = [(i, j) for i in range(len(tasks)) for j in range(i)]
    columns = [Column("expert"), Column("and"), *(Column(t, "number" if t == "Cosine" else "percent") for t in shown)]
    rows = [[tasks[i], tasks[j], *(matrix[i][j] for matrix in shown.values())] for i, j in pairs]
    tables = [Table("Every two task vectors (conflicts in %)", columns, rows)]
    if found.get("norms"):
        norms = [list(pair) for pair in zip(tasks, found["norms"], strict=True)]
        tables.append(Table("Lengths of the task vectors", [Column("expert"), Column("norm", "number")], norms))
    chart = Chart(
        "geometry", f"Matrices of {' and '.join(t.lower() for t in shown)} of {len(tasks)} task vectors.",
        lambda: _draw(tasks, shown), tables,
        note="A cosine near 0: unrelated, adding them does little harm. Sign conflicts: of the weights that both changed, the "
        "share changed in opposite directions; 50 % is chance.",
    )  # fmt: skip
    return Section("geometry", "Which tasks fight", _lead(tasks, shown, pairs), [chart])


def _lead(tasks: list[str], shown: dict[str, Matrix], pairs: list[tuple[int, int]]) -> list[str]:
    conflicts = shown.get("Sign conflicts")
    known = [(i, j) for i, j in pairs if conflicts and conflicts[i][j] is not None]
    if not conflicts or not known:
        return []
    i, j = max(known, key=lambda pair: conflicts[pair[0]][pair[1]] or 0.0)
    return [
        f"{tasks[i]} and {tasks[j]} conflict most: {100 * (conflicts[i][j] or 0.0):.0f} % of the weights that both changed "
        "go opposite ways."
    ]


def _sound(found: Mapping[str, Any]) -> bool:
    tasks = found.get("tasks") or []
    matrices = [found[name] for name in ("cosines", "sign_conflicts") if name in found]
    return bool(matrices) and all(len(m) == len(tasks) and all(len(row) == len(tasks) for row in m) for m in matrices)


def _without_diagonal(matrix: Matrix) -> Matrix:
    return [[None if i == j else value for j, value in enumerate(row)] for i, row in enumerate(matrix)]


def _draw(tasks: list[str], shown: dict[str, Matrix]) -> Any:
    made, grid = figure(1.1 + 0.24 * len(tasks), 1, len(shown), squeeze=False, sharey=True)
    for axes, (title, matrix) in zip(grid.flat, shown.items(), strict=True):
        flat = [value for row in matrix for value in row if value is not None]
        low, high = min(flat), max(flat)
        heat(axes, [[float("nan") if v is None else v for v in row] for row in matrix], low, high)
        named_axis(axes.yaxis, tasks)
        named_axis(axes.xaxis, tasks)
        axes.tick_params(axis="x", rotation=90)
        axes.set_title(title)
        if len(tasks) <= 10:
            scaled = matrix if title == "Cosine" else [[None if v is None else 100 * v for v in row] for row in matrix]
            factor = 1 if title == "Cosine" else 100
            write_cells(axes, scaled, low * factor, high * factor, "{:.2f}" if factor == 1 else "{:.0f}")
        axes.spines[:].set_visible(False)
    return made
