"""From settings to the stack of vectors that coefficients apply to: which rows, and which are cached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..methods import Method, chain, make_method
from ..methods.stage import Stage
from ..output.tensors import TensorWriter
from ..schedule import value_at
from ..stream import Pipeline, Workers
from ..task_vectors import TaskVectors
from ..weights.source import Spec
from .cache import cached, key
from .coefficients import COMBINED
from .layerwise import Distilled
from .settings import AdaptSettings

Inform = Callable[[Method, TaskVectors, Any], tuple[TaskVectors, Sequence[str]]]
"""``(method, vectors, how it was asked for)`` → the vectors with its statistics, and what identifies them."""


@dataclass(frozen=True)
class Stack:
    """The rows that coefficients apply to.

    Attributes:
        labels: of the rows, in order.
        initial: first coefficient of each row.
        cached: rows computed beforehand, by tensor name ``(S', numel)``; they come first.
        experts: whether the experts' own task vectors follow.
        nbytes: size of the cached part.
    """

    labels: tuple[str, ...]
    initial: tuple[float, ...]
    cached: Mapping[str, Tensor]
    experts: bool
    nbytes: int


def build_stack(
    settings: AdaptSettings,
    vectors: TaskVectors,
    workers: Workers,
    content: Sequence[str],
    say: Callable[[str], None],
    inform: Inform = lambda method, vectors, asked: (vectors, []),
    distilled: Distilled | None = None,
) -> Stack:
    """Compute, or take from the cache, what the settings ask for beyond the plain task vectors.

    Args:
        settings: `start` gives the combined row, `vectors` a transform of the task vectors.
        vectors: base, experts, plan.
        workers: threads.
        content: hashes of the weights, for the cache's key.
        say: told what is computed, and the size of what is stored.
        inform: gathers what methods must know of the tasks' inputs, and says what identifies it.
        distilled: the combined row, where `start` was learned from data.

    Raises:
        UsageError: unknown methods or options; a transform that ends in one vector.
    """
    tasks = vectors.tasks
    start = None if settings.start is None or distilled is not None else parse(settings.start)
    transform = None if settings.vectors is None else parse(settings.vectors)
    if transform is not None and (
        any(not stage.keeps_tasks for stage in transform.transform)
        or (transform.reduce is not None and not transform.transform)
    ):
        raise UsageError(
            f"vectors: '{transform.name}' combines the experts into one vector; use it as 'start'"
        )
    depth = (start is not None) + (len(tasks) if transform is not None and transform.transform else 0)
    entries = vectors.entries()
    specs = {entry.name: Spec((depth, vectors.numel(entry)), vectors.dtype(entry)) for entry in entries}
    nbytes = sum(spec.nbytes for spec in specs.values())
    rows: Mapping[str, Tensor] = {}
    if distilled is not None:
        rows, nbytes = distilled.rows, nbytes + distilled.nbytes
    if depth:
        known: list[Any] = []
        pipelines = []
        if start is not None:
            informed, found = inform(start, vectors, settings.start)
            pipelines.append((informed, *_combined(start, vectors)))
            known += found
        if transform is not None and transform.transform:
            informed, found = inform(transform, vectors, settings.vectors)
            pipelines.append((informed, transform.transform, 1.0))
            known += found
        names = list(vectors.tasks), [entry.name for entry in entries]  # DARE draws by them
        stored = [settings.start, settings.vectors, vectors.weights, *names]
        stored += [known] if known else []
        say(
            f"transformed task vectors: {nbytes / 1e6:.0f} MB in the disk cache "
            "(adamerging cache --clear frees it)"
        )

        def fill(writer: TensorWriter) -> None:
            ready = [(Pipeline(own, stages, workers), scale) for own, stages, scale in pipelines]
            for entry in entries:
                for pipeline, scale in ready:
                    pieces = list(workers.map(lambda job: job().stack, pipeline.chunks(entry)))
                    factor = value_at(scale, entry.name, vectors.places[entry.name])
                    writer.write((torch.cat(pieces, 1) * factor).to(specs[entry.name].dtype).contiguous())

        computed = cached(key("stack", stored, list(content)), specs, fill)
        rows = {name: torch.cat([rows[name], row]) if rows else row for name, row in computed.items()}
    experts = transform is None or not transform.transform
    combined = settings.start is not None
    labels = ((COMBINED,) if combined else ()) + tasks
    initial = ((1.0,) if combined else ()) + (settings.initial,) * len(tasks)
    return Stack(labels, initial, rows, experts, nbytes)


def parse(text: str | Sequence[Any]) -> Method:
    """A method or chain as a recipe writes it: a name, or a list of names and {name: options}."""
    items = [text] if isinstance(text, str) else list(text)
    steps = [(item, {}) if isinstance(item, str) else next(iter(item.items())) for item in items]
    return chain([make_method(name, options) for name, options in steps])


def _combined(method: Method, vectors: TaskVectors) -> tuple[tuple[Stage, ...], float]:
    from ..merging import check_method

    check_method(method, vectors, None)
    return method.stages, method.scale
