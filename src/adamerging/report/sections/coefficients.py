"""The coefficients that were learned."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from ..document import Chart, Column, Section, Table, short
from ..drawing import INK, PAPER, figure, heat, named_axis, write_cells
from ..view import View

MOST = 3


def coefficients(view: View) -> Section | None:
    """A heat map task × layer for each of the best learned models."""
    able = [line.label for line in view.by_quality() if view.first(line.label, "coefficients")]
    charts = []
    for number, label in enumerate(able[:MOST], 1):
        row = view.first(label, "coefficients")
        assert row is not None and row.coefficients is not None
        found = row.coefficients
        if not _sound(found):
            continue
        seed = f" (seed {row.seed})" if row.seed is not None else ""
        charts.append(
            Chart(
                f"coefficients-{number}",
                f"Coefficients of {label}: {len(found['tasks'])} tasks by {len(found['groups'])} groups.",
                lambda found=found: _draw(found),  # type: ignore[misc]
                [_table(label, found)],
                title=f"{label}{seed}",
                note="Lines: where a block of the network ends." if _blocks(found) else "",
            )
        )
    if not charts:
        return None
    rest = (
        f" The other learned models, {', '.join(able[MOST:])}, are in the records."
        if len(able) > MOST
        else ""
    )
    lead = "How much of each expert went into each part of the network; the brighter, the more." + rest
    return Section("coefficients", "The coefficients", [lead], charts)


def _sound(found: Mapping[str, Any]) -> bool:
    """Whether the values are as many as tasks and groups say."""
    values, groups = found.get("values"), found.get("groups")
    tasks = found.get("tasks")
    return bool(
        values
        and groups
        and tasks
        and len(values) == len(tasks)
        and all(len(v) == len(groups) for v in values)
    )


def _table(label: str, found: Mapping[str, Any]) -> Table:
    blocks = found.get("blocks") or []
    by_block = len(blocks) == len(found["groups"]) > 1
    columns = [Column("weights"), *([Column("block")] if by_block else [])]
    columns += [Column(task, "number") for task in found["tasks"]]
    rows = [
        [group, *([blocks[n]] if by_block else []), *(own[n] for own in found["values"])]
        for n, group in enumerate(found["groups"])
    ]
    return Table(f"Coefficients of {label}", columns, rows)


def _blocks(found: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """(block, first column, columns) of the runs of one block; empty where blocks are not known."""
    blocks = found.get("blocks") or []
    if len(blocks) != len(found["groups"]):
        return []
    runs, start = [], 0
    for block, members in groupby(blocks):
        count = len(list(members))
        runs.append((block or "", start, count))
        start += count
    return runs if 1 < len(runs) < len(blocks) else []


def _draw(found: Mapping[str, Any]) -> Any:
    values, tasks, groups = found["values"], found["tasks"], found["groups"]
    flat = [value for own in values for value in own if value is not None]
    low, high = min(0.0, *flat), max(flat)
    if len(groups) <= 3:  # a column each would be wider than it says anything
        values, tasks, groups = [list(own) for own in zip(*values, strict=True)], groups, tasks
    made, axes = figure(0.9 + 0.19 * len(tasks))
    picture = heat(axes, values, low, high)
    named_axis(axes.yaxis, tasks)
    runs = _blocks(found) if len(found["groups"]) > 3 else []
    if runs:
        for _, start, _ in runs[1:]:
            axes.axvline(start - 0.5, color=PAPER, lw=1.6)
        wide = [(b, s, c) for b, s, c in runs if c / len(groups) > 0.03]
        axes.set_xticks(
            [start + count / 2 - 0.5 for _, start, count in wide], [_last(block) for block, _, _ in wide]
        )
        axes.set_xlabel("block of the network")
    else:
        named_axis(axes.xaxis, groups, 24)
        axes.tick_params(axis="x", rotation=90 if len(groups) > 6 else 0)
    if len(groups) <= 14:
        write_cells(axes, values, low, high, "{:.2f}")
    axes.spines[:].set_visible(False)
    bar = made.colorbar(picture, ax=axes, shrink=0.9, pad=0.015, aspect=14)
    bar.outline.set_visible(False)
    bar.ax.tick_params(color=INK)
    return made


def _last(block: str) -> str:
    """The telling end of a block's name: encoder.layer.3 → 3."""
    tail = block.rpartition(".")[2]
    return tail if tail.isdigit() else short(block, 12)
