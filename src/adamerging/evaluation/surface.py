"""Loss and entropy over the coefficients of two tasks: the ground that learning walks on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ..adaptation.body import Body
from ..adaptation.coefficients import layout
from ..adaptation.objectives import sample_entropy
from ..adaptation.store import VectorStore
from ..errors import UsageError
from ..stream import Workers
from ..task_vectors import TaskVectors
from ..tasks.task import Samples, Task
from .inference import Feed, logits_from

GRID = tuple(number / 8 for number in range(9))
KEPT = 1 << 28
"""Bytes of ready inputs of either task that are kept from point to point."""
Fill = Callable[[float, float], None]
Measure = Callable[[], tuple[float, float]]


def loss_surface(
    fill: Fill, score: Measure, x: Sequence[float], y: Sequence[float], tasks: Sequence[str] = ("x", "y")
) -> dict[str, Any]:
    """Loss and entropy on a grid: ``loss[i][j]`` and ``entropy[i][j]`` are those at ``y[i]`` and ``x[j]``.

    Args:
        fill: makes the working model that of two coefficients, the first along x.
        score: its loss and entropy then.
        x, y: the values of either coefficient.
        tasks: the two names.
    """
    loss: list[list[float]] = []
    entropy: list[list[float]] = []
    for second in y:
        cells = []
        for first in x:
            fill(first, second)
            cells.append(score())
        loss.append([cell[0] for cell in cells])
        entropy.append([cell[1] for cell in cells])
    return {"tasks": list(tasks), "x": list(x), "y": list(y), "loss": loss, "entropy": entropy}


def slice_of(
    body: Body,
    vectors: TaskVectors,
    workers: Workers,
    tasks: Sequence[tuple[Task, nn.Module]],
    *,
    others: float = 0.0,
    x: Sequence[float] = GRID,
    y: Sequence[float] = GRID,
    limit: int = 256,
    refresh: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The surface over two experts' coefficients, one for the whole network each; the record's ``slice``.

    Args:
        body: the working body; it ends as the last point of the grid.
        vectors: base and experts.
        workers: threads.
        tasks: the two, with modules attached to the body and labelled evaluation data; loss and entropy are
            means over the two.
        others: coefficient of every other expert.
        x, y: values of the first and the second task's coefficient.
        limit: of each task's evaluation samples the first so many are scored at each point.
        refresh: called after the weights are in place, to re-estimate BatchNorm statistics.

    Raises:
        UsageError: not two tasks, no expert for one, or no labelled data.
    """
    names = [task.name for task, _ in tasks]
    if len(set(names)) != 2:
        raise UsageError(f"a slice is spanned by two tasks, got: {', '.join(names) or 'none'}")
    lacking = [name for name in names if name not in vectors.tasks]
    if lacking:
        raise UsageError(f"no expert for {', '.join(lacking)}; experts: {', '.join(vectors.tasks)}")
    data = [_first(task, limit) for task, _ in tasks]
    feeds = [Feed(task, samples, keep=KEPT) for (task, _), (samples, _) in zip(tasks, data, strict=True)]
    store = VectorStore(vectors, workers, device=body.device)
    where = layout("task", vectors.tasks, store.entries(), vectors.places)

    def fill(first: float, second: float) -> None:
        chosen = dict(zip(names, (first, second), strict=True))
        body.reset(vectors)
        values = where.full([chosen.get(name, others) for name in vectors.tasks])
        store.materialise(body.tensors, values, where)
        refresh()

    def score() -> tuple[float, float]:
        loss = entropy = 0.0
        for (task, module), feed, (_, labels) in zip(tasks, feeds, data, strict=True):
            logits = logits_from(module, task, feed, body.device)
            loss += float(cross_entropy(logits, labels)) / 2
            entropy += float(sample_entropy(logits).mean()) / 2
        return loss, entropy

    return loss_surface(fill, score, x, y, names)


def _first(task: Task, limit: int) -> tuple[Samples, Any]:
    if task.evaluate is None or task.evaluate.labels is None:
        raise UsageError(f"task '{task.name}' has no labelled data to score on; give evaluate=")
    count = min(limit, len(task.evaluate))
    inputs = [task.evaluate.inputs[number] for number in range(count)]
    labels = [task.evaluate.labels[number] for number in range(count)]
    return replace(task.evaluate, inputs=inputs, labels=labels), torch.tensor(labels)
