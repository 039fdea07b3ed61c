"""Merge opened weights: the tensors of the merged body, piece by piece, in the base's order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from .errors import UsageError
from .methods.stage import Chunk, Method
from .plan import Entry
from .schedule import Schedule, check, value_at
from .stream import Pipeline
from .task_vectors import TaskVectors
from .vocabulary import Rows, read_rows


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive values of one merged tensor.

    Attributes:
        entry: the tensor.
        values: ``(n,)`` in the output's dtype; pieces of a tensor follow each other without gaps.
    """

    entry: Entry
    values: Tensor


def check_method(method: Method, vectors: TaskVectors, scale: Schedule | None) -> None:
    """Refuse what the method cannot do with these experts, weights and scale.

    Raises:
        UsageError: too few or too many experts, weights where none apply, a weight or scale unreadable.
    """
    least, most = method.experts
    count = len(vectors.tasks)
    if count < least or (most is not None and count > most):
        wanted = (
            f"exactly {least}"
            if least == most
            else f"at least {least}"
            if most is None
            else f"at most {most}"
        )
        raise UsageError(
            f"method '{method.name}' merges {wanted} experts, got {count}: {', '.join(vectors.tasks)}"
        )
    check(vectors.weights, "weight", tasks=vectors.tasks)
    if not method.weighted and vectors.weights != 1.0:
        raise UsageError(
            f"method '{method.name}' takes no weights by expert; 'weighted' is the weighted average"
        )
    if scale is not None:
        if method.masks is not None:
            raise UsageError(
                f"method '{method.name}' takes no scale: each task's weights are rebuilt from its mask"
            )
        check(scale, "scale")
        if isinstance(scale, Mapping):
            raise UsageError("scale multiplies the merged vector and cannot differ by expert; weights can")
    for entry in vectors.entries():  # rules by name may leave some out
        place = vectors.places[entry.name]
        for task in vectors.tasks:
            value_at(vectors.weights, entry.name, place, task)
        if scale is not None:
            value_at(scale, entry.name, place)


def check_statistics(method: Method, vectors: TaskVectors) -> None:
    """Refuse a method that needs statistics of data, where none were gathered.

    Raises:
        UsageError: it does, and what to give.
    """
    if method.statistics is not None and vectors.statistics is None:
        raise lacking_data(method, vectors.tasks)


def lacking_data(method: Method, tasks: Iterable[str]) -> UsageError:
    """What to say where these tasks have no unlabeled inputs for the method to look at."""
    return UsageError(
        f"method '{method.name}' looks at unlabeled inputs of every expert's task, and there are none for: "
        f"{', '.join(tasks)}. Give some for each: --data NAME=FILE, or tasks: {{NAME: {{adapt: FILE}}}} in "
        "the recipe, or tasks=[...] in Python"
    )


def merged_pieces(
    pipeline: Pipeline,
    names: Iterable[str],
    *,
    scale: Schedule = 1.0,
    dtype: torch.dtype | None = None,
    tails: Mapping[str, Sequence[Rows]] | None = None,
) -> Iterator[Piece]:
    """Tensors of the merged body, one after the other, in pieces.

    Arithmetic is in float32 (float64 for a float64 base) with one rounding, to ``dtype``.

    Args:
        pipeline: the method's stages over base, experts and plan.
        names: of the tensors, in the wanted order.
        scale: λ.
        dtype: of the floating-point output tensors; the base's own when None.
        tails: by tensor name, what follows the merged rows instead of the base's rows.

    Raises:
        NonFiniteError: NaN or infinity in base or experts.
    """
    vectors = pipeline.vectors

    def merge(compute: Callable[[], Chunk], entry: Entry, target: torch.dtype) -> Piece:
        chunk = compute()
        factor = value_at(scale, chunk.name, chunk.place)
        return Piece(entry, torch.add(chunk.base, chunk.stack[0], alpha=factor).to(target))

    def jobs() -> Iterator[Callable[[], Piece]]:
        for name in names:
            entry = vectors.plan.entries[name]
            target = output_dtype(entry, dtype)
            if entry.treatment == "merged":
                for compute in pipeline.chunks(entry):
                    yield partial(merge, compute, entry, target)
                done = vectors.numel(entry)
                if tails is not None and name in tails:
                    for rows, start, stop in _spans(vectors, entry, tails[name]):
                        yield partial(_appended, vectors, entry, rows, start, stop, target)
                elif done < entry.spec.numel:
                    yield partial(_copied, vectors, entry, done, target)
            elif entry.treatment == "averaged":
                yield partial(_averaged, vectors, entry, target)
            else:
                yield partial(_copied, vectors, entry, 0, target)

    return pipeline.workers.map(lambda job: job(), jobs())


def fill(tensors: Mapping[str, Tensor], pipeline: Pipeline, names: Iterable[str], **keywords: Any) -> None:
    """Stream merged tensors into tensors that exist.

    Args:
        tensors: by the base's names, in their shapes.
        pipeline: the method's stages over base, experts and plan.
        names: of the tensors.
        keywords: of `merged_pieces`.
    """
    done = dict.fromkeys(names, 0)
    with torch.no_grad():
        for piece in merged_pieces(pipeline, done, **keywords):
            start, name = done[piece.entry.name], piece.entry.name
            done[name] = start + piece.values.numel()
            tensors[name].view(-1)[start : done[name]].copy_(piece.values)


def output_dtype(entry: Entry, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype a tensor is written in: only floating-point ones follow a request."""
    return dtype if dtype is not None and entry.spec.dtype.is_floating_point else entry.spec.dtype


def _copied(vectors: TaskVectors, entry: Entry, start: int, dtype: torch.dtype) -> Piece:
    return Piece(entry, vectors.base.read(entry.name).reshape(-1)[start:].to(dtype))


def _spans(vectors: TaskVectors, entry: Entry, tail: Iterable[Rows]) -> Iterator[tuple[Rows, int, int]]:
    step = max(1, vectors.chunk_values // prod(entry.spec.shape[1:]))
    for rows in tail:
        for start in range(0, rows.count, step):
            yield rows, start, min(start + step, rows.count)


def _appended(
    vectors: TaskVectors, entry: Entry, rows: Rows, start: int, stop: int, dtype: torch.dtype
) -> Piece:
    """Rows of a vocabulary that follow those which all share."""
    values = read_rows(vectors.base, vectors.experts, entry, rows, start, stop)
    return Piece(entry, values.reshape(-1).to(dtype))


def _averaged(vectors: TaskVectors, entry: Entry, dtype: torch.dtype) -> Piece:
    """Running statistics of a normalisation: the experts' mean, whatever the method."""
    chunk = vectors.read(vectors.open(entry), 0, entry.spec.numel)
    return Piece(entry, (chunk.base + chunk.vectors.mean(0)).to(dtype))
