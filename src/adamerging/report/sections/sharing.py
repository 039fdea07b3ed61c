"""Which tasks have which layers of their own."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from ..document import Chart, Column, Section, Table, percent
from ..drawing import PAPER, figure, named_axis, tint
from ..view import View


def sharing(view: View) -> Section | None:
    """The map tasks by layers of experts over one shared base."""
    found = view.comparison.sharing
    if not found or not _sound(found):
        return None
    tasks, layers, values = found["tasks"], found["layers"], found["values"]
    columns = [Column("layer"), *(Column(task, "count") for task in tasks)]
    rows = [[layer, *(own[n] for own in values)] for n, layer in enumerate(layers)]
    tables = [Table("Layers of a task's own: 1; the base's: 0", columns, rows)]
    sizes = _sizes(found)
    if sizes is not None:
        tables.append(sizes)
    chart = Chart(
        "sharing",
        f"Map of {len(tasks)} tasks by {len(layers)} layers: which have values of their own.",
        lambda: _draw(found),
        tables,
        note="Dark: the task has its own values. Light: it uses the base's. From the input on the left to "
        "the output on the right; lines where a block of the network ends.",
    )
    return Section("sharing", "Which layers the tasks share", _lead(found), [chart])


def _lead(found: Mapping[str, Any]) -> list[str]:
    values, layers = found["values"], found["layers"]
    own = sum(map(sum, values)) / (len(values) * len(layers))
    gone = sum(not any(task[n] for task in values) for n in range(len(layers)))
    lead = f"On average a task has {percent(own)} of the layers of its own."
    if isinstance(found.get("multiple"), float):
        lead += f" Base and {len(values)} tasks together take {found['multiple']:.2f} times one model."
    if gone:
        lead += f" {gone} of {len(layers)} layers no task changed: there is no coefficient to learn for them."
    return [lead]


def _sizes(found: Mapping[str, Any]) -> Table | None:
    parameters, base = found.get("parameters"), found.get("base")
    if not parameters or not base or set(parameters) != set(found["tasks"]):
        return None
    rows = [
        [task, sum(task_own), sum(parameters[task].values()), sum(parameters[task].values()) / base]
        for task, task_own in zip(found["tasks"], found["values"], strict=True)
    ]
    columns = [
        Column("task"),
        Column("own layers", "count"),
        Column("own parameters", "count"),
        Column("of the base", "percent"),
    ]
    return Table("What each task adds (of the base in %)", columns, rows)


def _sound(found: Mapping[str, Any]) -> bool:
    tasks, layers, values = (found.get(key) for key in ("tasks", "layers", "values"))
    return bool(
        tasks
        and layers
        and values
        and len(values) == len(tasks)
        and all(len(own) == len(layers) and all(value in (0, 1) for value in own) for own in values)
    )


def _draw(found: Mapping[str, Any]) -> Any:
    tasks, layers, values = found["tasks"], found["layers"], found["values"]
    made, axes = figure(0.9 + 0.21 * len(tasks))
    tint(axes, values, 0, 1)
    named_axis(axes.yaxis, tasks)
    blocks = found.get("blocks") or []
    start, ticks = 0, []
    for block, members in groupby(blocks if len(blocks) == len(layers) else []):
        count = len(list(members))
        if start:
            axes.axvline(start - 0.5, color=PAPER, lw=2.4)
        if block is not None and count / len(layers) > 0.03:
            ticks.append((start + count / 2 - 0.5, str(block).rpartition(".")[2]))
        start += count
    if ticks:
        axes.set_xticks([place for place, _ in ticks], [name for _, name in ticks])
        axes.set_xlabel("block of the network")
    else:
        named_axis(axes.xaxis, layers, 24)
        axes.tick_params(axis="x", rotation=90)
    axes.spines[:].set_visible(False)
    return made
