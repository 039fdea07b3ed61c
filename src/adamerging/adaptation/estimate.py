"""What learning will take, from names, shapes and the data alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..run import Prepared
from ..tasks.task import Task
from .batches import split
from .cache import cache_folder
from .coefficients import COMBINED, layout
from .layerwise_settings import asked_for, sizes
from .session import make_objective, match_tasks
from .settings import AdaptSettings


@dataclass(frozen=True)
class AdaptEstimate:
    """What learning will take.

    Attributes:
        samples: by task, how many are learned from and how many are held out.
        coefficients: how many are learned, at most (tensors that no expert changed take none).
        steps: optimiser steps.
        cached: bytes of transformed task vectors in the disk cache, and of the experts' predictions about.
        cache: the cache's folder.
        memory: bytes of the working model, its gradients and the coefficients; activations come on top, as
            in plain training with the same batches.
        disk: bytes of the weights it will write.
    """

    samples: Mapping[str, tuple[int, int]]
    coefficients: int
    steps: int
    cached: int
    cache: str
    memory: int
    disk: int


def estimate_adaptation(prepared: Prepared, tasks: Sequence[Task], settings: AdaptSettings) -> AdaptEstimate:
    """Sizes and counts; nothing is computed. Raises as the run would for tasks that do not fit."""
    vectors = prepared.vectors
    ordered = match_tasks(vectors.tasks, tasks, make_objective(settings))
    labels = ((COMBINED,) if settings.start is not None else ()) + vectors.tasks
    where = layout(settings.granularity, labels, vectors.entries(), vectors.places)
    merged = sum(vectors.numel(entry) * vectors.dtype(entry).itemsize for entry in vectors.entries())
    depth = (settings.start is not None) + len(vectors.tasks) * (settings.vectors is not None)
    body = sum(
        entry.spec.numel * max(entry.spec.dtype.itemsize, 4) for entry in vectors.plan.entries.values()
    )
    heads = sum(spec.nbytes for head in vectors.plan.heads.values() for spec in head.values())
    kept = (len(labels) + 1) * merged
    distilled, block = sizes(vectors) if asked_for(settings.start) is not None else (0, 0)
    parts = {
        task.name: split(
            len(task.adapt), settings.held_out, settings.held_out_limit, settings.seed, task.name
        )
        for task in ordered
        if task.adapt is not None
    }
    return AdaptEstimate(
        {name: (len(train), len(held)) for name, (train, held) in parts.items()},
        distilled + (len(labels) * where.width if settings.steps else 0),
        settings.steps,
        depth * merged,
        str(cache_folder()),
        body
        + max(merged, block)
        + heads
        + len(labels) * where.width * 16
        + (kept if kept <= settings.budget * 1e9 else 0),
        prepared.nbytes,
    )
