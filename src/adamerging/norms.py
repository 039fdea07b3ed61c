"""BatchNorm statistics that each task has of its own, kept with its head.

One set of statistics must serve all tasks of a merged network, whose inputs may look nothing like each other.
They are small, and the task is known wherever a head is chosen, so each task may as well have its own:
re-estimated on its inputs or, without any, its expert's.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .task_vectors import TaskVectors

OWN = "no single model: each task has BatchNorm statistics of its own, and needs the task's name"
Statistics = Mapping[str, Tensor]
"""Running means and variances by the body's names."""


def statistics_of(vectors: TaskVectors, task: str) -> dict[str, Tensor]:
    """An expert's statistics; the base's where it has none.

    Args:
        vectors: base and experts.
        task: which.
    """
    return {e.name: vectors.of_expert(e, task) for e in vectors.plan.with_treatment("averaged")}


def as_stored(vectors: TaskVectors, task: str, statistics: Statistics) -> dict[str, Tensor]:
    """Statistics as a task's file holds them: by its expert's names, in the base's dtypes.

    Args:
        vectors: base and experts.
        task: whose they are.
        statistics: all of them.
    """
    stored = {}
    for entry in vectors.plan.with_treatment("averaged"):
        value = statistics[entry.name].detach().cpu()
        stored[entry.sources.get(task, entry.name)] = value.to(entry.spec.dtype, copy=True)
    return stored
