"""Loss and entropy over the coefficients of two tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..document import Chart, Column, Section, Table
from ..drawing import PAPER, SEQUENTIAL, figure
from ..view import View


def surface(view: View) -> Section | None:
    """Two contour plots, each with its lowest point."""
    found = view.comparison.slice
    if not found or not _sound(found):
        return None
    a, b = found["tasks"]
    shown = {
        title: found[name] for name, title in (("loss", "Loss, with labels"), ("entropy", "Entropy, without"))
    }
    rows = [
        [x, y, found["loss"][i][j], found["entropy"][i][j]]
        for i, y in enumerate(found["y"])
        for j, x in enumerate(found["x"])
    ]
    table = Table(
        "Mean over the two tasks, nats",
        [
            Column(f"λ of {a}", "number"),
            Column(f"λ of {b}", "number"),
            Column("loss", "number"),
            Column("entropy", "number"),
        ],
        rows,
    )
    best = {title: _lowest(found, values) for title, values in shown.items()}
    (x1, y1), (x2, y2) = best.values()
    lead = (
        f"Loss is lowest at λ = {x1:.2g} for {a} and {y1:.2g} for {b}; entropy, which needs no labels, at "
        f"{x2:.2g} and {y2:.2g}."
    )
    chart = Chart(
        "surface",
        f"Contours of loss and of entropy over the coefficients of {a} and {b}.",
        lambda: _draw(found, shown, best),
        [table],
        note="Dot: the lowest point of the grid. Darker is lower." + _others(found),
    )
    return Section("surface", "The ground that learning walks on", [lead], [chart])


def _others(found: Mapping[str, Any]) -> str:
    """Where the other experts stay."""
    value = found.get("others")
    return f" The other experts stay at λ = {value:.2g}." if isinstance(value, float) and value else ""


def _sound(found: Mapping[str, Any]) -> bool:
    x, y = found.get("x") or [], found.get("y") or []
    grids = [found.get("loss") or [], found.get("entropy") or []]
    return (
        len(found.get("tasks") or []) == 2
        and min(len(x), len(y)) > 1
        and all(len(g) == len(y) and all(len(row) == len(x) and None not in row for row in g) for g in grids)
    )


def _lowest(found: Mapping[str, Any], values: list[list[float]]) -> tuple[float, float]:
    _, i, j = min((value, i, j) for i, row in enumerate(values) for j, value in enumerate(row))
    return found["x"][j], found["y"][i]


def _draw(found: Mapping[str, Any], shown: Mapping[str, Any], best: Mapping[str, tuple[float, float]]) -> Any:
    made, grid = figure(3.1, 1, 2, sharey=True)
    for axes, (title, values) in zip(grid, shown.items(), strict=True):
        picture = axes.contourf(found["x"], found["y"], values, levels=12, cmap=SEQUENTIAL)
        picture.set_rasterized(True)
        axes.plot(
            *best[title], marker="o", ms=6, color=PAPER, mec="#000000", mew=1, ls="", clip_on=False, zorder=5
        )
        axes.set_title(title)
        axes.set_xlabel(f"λ of {found['tasks'][0]}")
        bar = made.colorbar(picture, ax=axes, shrink=0.9, pad=0.02)
        bar.outline.set_visible(False)
    grid[0].set_ylabel(f"λ of {found['tasks'][1]}")
    return made
