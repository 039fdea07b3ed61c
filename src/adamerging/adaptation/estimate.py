"""What learning will take, from names, shapes and the data alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..routing.estimate import estimate_routes
from ..run import Prepared
from ..tasks.task import Task
from .batches import split
from .cache import cache_folder
from .coefficients import COMBINED, layout
from .joint import wanted
from .layerwise_settings import asked_for, distilled_sizes
from .session import make_objective, match_tasks
from .settings import AdaptSettings
from .spectrum import sizes


@dataclass(frozen=True)
class AdaptEstimate:
    """What learning will take.

    Attributes:
        samples: by task, how many are learned from and how many are held out.
        coefficients: how many are learned, gates and those of distillation among them, at most (tensors that
            no expert changed take none); heads and modules of the tasks' own come on top.
        steps: optimiser steps.
        cached: bytes of transformed task vectors, or of singular components, in the disk cache; the experts'
            predictions come on top.
        cache: the cache's folder.
        memory: bytes of the working model, its gradients and the coefficients; activations come on top, as
            in plain training with the same batches.
        joint: whether these are of a batch of every task at once, at most.
        disk: bytes of the weights it will write.
    """

    samples: Mapping[str, tuple[int, int]]
    coefficients: int
    steps: int
    cached: int
    cache: str
    memory: int
    joint: bool
    disk: int


def estimate_adaptation(prepared: Prepared, tasks: Sequence[Task], settings: AdaptSettings) -> AdaptEstimate:
    """Sizes and counts; nothing is computed. Raises as the run would for tasks that do not fit."""
    vectors = prepared.vectors
    ordered = match_tasks(vectors.tasks, tasks, make_objective(settings))
    labels = ((COMBINED,) if settings.start is not None else ()) + vectors.tasks
    where = layout(settings.granularity, labels, vectors.entries(), vectors.places)
    merged = sum(vectors.numel(entry) * vectors.dtype(entry).itemsize for entry in vectors.entries())
    count, singular = len(labels) * where.width, settings.granularity == "singular"
    depth = (settings.start is not None) + len(vectors.tasks) * (settings.vectors is not None)
    body = sum(
        entry.spec.numel * max(entry.spec.dtype.itemsize, 4) for entry in vectors.plan.entries.values()
    )
    heads = sum(spec.nbytes for head in vectors.plan.heads.values() for spec in head.values())
    kept, cached = (len(labels) + 1) * merged, depth * merged
    if settings.granularity == "value":
        count, kept = sum(vectors.numel(entry) for entry in vectors.entries()), 2 * merged
    if singular:
        count, cached = sizes(settings, vectors)
        kept = 0 if settings.device == "cpu" else cached
    distilled, block = distilled_sizes(vectors) if asked_for(settings.start) is not None else (0, 0)
    parts = {
        task.name: split(
            len(task.adapt), settings.held_out, settings.held_out_limit, settings.seed, task.name
        )
        for task in ordered
        if task.adapt is not None
    }
    memory = body + max(merged, block) + heads + (kept if kept <= settings.budget * 1e9 else 0)
    disk = prepared.nbytes
    if settings.mask is not None:  # logits, two moments, the mask and its gradient
        memory += 5 * merged
    if settings.route is not None:
        routed = estimate_routes(vectors, settings)
        count, memory, disk = routed.learned, memory + 4 * routed.values, disk + routed.nbytes
    memory += count * 16 + (3 * heads if settings.heads == "learned" else 0)  # gradient and two moments
    count = distilled + (count if settings.steps else 0)
    if settings.mask is not None:
        count += sum(vectors.numel(entry) for entry in vectors.entries())
    return AdaptEstimate(
        {name: (len(train), len(held)) for name, (train, held) in parts.items()},
        count,
        settings.steps,
        cached,
        str(cache_folder()),
        memory,
        wanted(settings, prepared.plan, prepared.own_statistics),
        disk,
    )
