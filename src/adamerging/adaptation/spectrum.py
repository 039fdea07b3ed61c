"""The singular components that gates open and shut: which, of what, decomposed once and kept on disk.

A tensor *with gates* is a matrix inside the blocks. It is a sum of rank-one components, some for each row:

    merged[n] = origin[n] + Σ_k λ[k, n] · Σ_i gate[k, n, i] · s_i u_i v_iᵀ

All other tensors have rows of plain values, as elsewhere. What the components are follows from the settings:
those of each task vector (the origin is the base), of each difference to the average (`cart`; the origin is
the average), the decorrelated ones of `tsv_m`, the common and own ones of `iso_cts`; of any other method
those of the vector that it makes for each expert, or of the one vector that it ends in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import Tensor

from ..errors import NonFiniteError, UsageError
from ..methods.components import Components, Triplets
from ..methods.spectral import TEXT_PROJECTION, leading
from ..methods.stage import Chunk, Stage
from ..output.tensors import TensorWriter
from ..plan import Entry
from ..stream import Pipeline, Workers
from ..task_vectors import TaskVectors
from ..weights.source import Factors, Spec
from .cache import cached, key
from .coefficients import COMBINED
from .settings import AdaptSettings
from .stack import parse


@dataclass(frozen=True)
class Source:
    """What is decomposed, and where learning starts.

    Attributes:
        rows: labels: what belongs to no expert, if there is such a row, and the experts.
        strength: first coefficient of all rows.
        kept: fraction of a matrix's rank whose gates are open at first.
        stages: what becomes of the task vectors before matrices are decomposed.
        components: how a method decomposes them; the singular triplets of each row when None.
        plain: the same stages for tensors without gates; None where those are the task vectors.
        plain_rows: their rows, the origin left out.
    """

    rows: tuple[str, ...]
    strength: float
    kept: float
    stages: tuple[Stage, ...]
    components: Components | None
    plain: tuple[Stage, ...] | None
    plain_rows: tuple[str, ...]

    @property
    def centred(self) -> bool:
        """Whether the origin is the average, and not the base."""
        return self.components is not None and self.components.centred


@dataclass(frozen=True)
class Part:
    """The components of one row of one tensor, strongest first.

    Attributes:
        row: its number among the labels.
        left: ``(r, m)`` left vectors.
        values: ``(r,)`` strengths.
        right: ``(r, n)`` right vectors.
        rank: of the matrix, min(m, n).
    """

    row: int
    left: Tensor
    values: Tensor
    right: Tensor
    rank: int


@dataclass(frozen=True)
class Matrix:
    """A tensor with gates.

    Attributes:
        entry: its line of the plan.
        origin: ``(m · n,)`` what is added to the base beside the components; None for nothing.
        parts: the rows that change it.
    """

    entry: Entry
    origin: Tensor | None
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Spectrum:
    """All that gates are put on.

    Attributes:
        source: what was decomposed.
        matrices: tensors with gates.
        plain: of the other tensors, by name ``(S, numel)`` rows; empty where they are the task vectors.
        nbytes: size on disk.
    """

    source: Source
    matrices: tuple[Matrix, ...]
    plain: Mapping[str, Tensor]
    nbytes: int


def source_of(settings: AdaptSettings, vectors: TaskVectors) -> Source:
    """What the settings ask to decompose.

    Raises:
        UsageError: both a start and transformed vectors; unknown methods; weights, which have no place here.
    """
    from ..merging import check_method

    tasks = vectors.tasks
    if vectors.weights != 1.0:
        raise UsageError("granularity: singular learns how much of each expert to take, and takes no weights")
    if settings.start is not None and settings.vectors is not None:
        raise UsageError(
            "granularity: singular decomposes either the merge it starts from (start) or transformed vectors "
            "(vectors); give one of them"
        )
    kept = 1.0 if settings.kept is None else settings.kept
    given = settings.start if settings.start is not None else settings.vectors
    if given is None:
        return Source(tasks, settings.initial, kept, (), None, None, tasks)
    method = parse(given)
    separate = all(stage.keeps_tasks for stage in method.transform)
    if settings.vectors is not None:
        if not separate or (method.reduce is not None and not method.transform):
            raise UsageError(
                f"vectors: '{method.name}' combines the experts into one vector; use it as 'start'"
            )
        stages = method.transform
        return Source(tasks, settings.initial, kept, stages, None, stages or None, tasks)
    check_method(method, vectors, None)
    found = method.components
    if found is not None:
        rows = ((COMBINED,) if found.shared else ()) + tasks
        kept = found.kept if settings.kept is None else settings.kept
        plain = (_differences(),) if found.centred else method.stages if found.shared else method.transform
        owners = tasks if not found.shared else (COMBINED,)
        return Source(rows, found.strength * method.scale, kept, (), found, plain, owners)
    by_task = separate and method.reduce is None
    rows = tasks if by_task else (COMBINED,)
    stages = method.transform if by_task else method.stages
    strength = method.scale / (len(tasks) if by_task and method.normalise else 1)
    return Source(rows, strength, kept, stages, None, stages or None, rows)


def _differences() -> Stage:
    """The average of the experts, and each one's difference to it, ``(K, n) → (1 + K, n)``."""

    def apply(chunk: Chunk, _: None) -> Tensor:
        average = chunk.stack.mean(0, keepdim=True)
        return torch.cat([average, chunk.stack - average])

    return Stage("differences to the average", apply)


def with_gates(settings: AdaptSettings, vectors: TaskVectors, entries: Sequence[Entry]) -> list[Entry]:
    """The entries that are matrices and stand where gates are wanted.

    Raises:
        UsageError: there are none.
    """
    found = []
    for entry in entries:
        rows, columns = _sides(vectors, entry)
        inside = settings.gated == "all" or vectors.places[entry.name].index is not None
        projection = any(fnmatchcase(entry.name, pattern) for pattern in TEXT_PROJECTION)
        if min(rows, columns) > 1 and inside and not projection:
            found.append(entry)
    if not found:
        where = " inside a numbered block" if settings.gated == "blocks" else ""
        hint = "; gated: all takes those outside too" if settings.gated == "blocks" else ""
        raise UsageError(f"granularity: singular needs a matrix{where} that some expert changed{hint}")
    return found


def ranks_of(source: Source, vectors: TaskVectors, entry: Entry) -> list[int]:
    """How many components each row of a tensor with gates has; 0 where an expert left the tensor alone."""
    rows, columns = _sides(vectors, entry)
    rank = min(rows, columns)
    if source.components is not None:
        ranks = list(source.components.ranks(rows, columns, len(vectors.tasks)))
    else:
        ranks = [rank] * len(source.rows)
    if source.centred:
        return ranks
    adapters = vectors.open(entry).experts if not source.stages and source.components is None else ()
    for number, label in enumerate(source.rows):
        if label not in vectors.tasks:
            continue
        if vectors.scanned and entry.name not in vectors.changed[label]:
            ranks[number] = 0
        elif adapters:
            adapter = adapters[vectors.tasks.index(label)]
            if isinstance(adapter, Factors):
                ranks[number] = min(rank, adapter.right.shape[0])
    return ranks


def specs_of(
    source: Source, vectors: TaskVectors, gated: Sequence[Entry], others: Sequence[Entry]
) -> dict[str, Spec]:
    """Names and shapes of what is kept on disk."""
    specs: dict[str, Spec] = {}
    for entry in gated:
        dtype, (rows, columns) = vectors.dtype(entry), _sides(vectors, entry)
        if source.centred:
            specs[f"{entry.name}/origin"] = Spec((rows * columns,), dtype)
        for row, rank in enumerate(ranks_of(source, vectors, entry)):
            if rank:
                specs[f"{entry.name}/{row}/left"] = Spec((rank, rows), dtype)
                specs[f"{entry.name}/{row}/values"] = Spec((rank,), dtype)
                specs[f"{entry.name}/{row}/right"] = Spec((rank, columns), dtype)
    if source.plain is not None:
        depth = len(source.plain_rows) + source.centred
        for entry in others:
            specs[entry.name] = Spec((depth, vectors.numel(entry)), vectors.dtype(entry))
    return specs


def sizes(settings: AdaptSettings, vectors: TaskVectors) -> tuple[int, int]:
    """How many coefficients and gates there will be at most, and how many bytes on disk.

    Raises:
        UsageError: see `source_of` and `with_gates`.
    """
    source, entries = source_of(settings, vectors), vectors.entries()
    gated = with_gates(settings, vectors, entries)
    names = {entry.name for entry in gated}
    others = [entry for entry in entries if entry.name not in names]
    ranks = [rank for entry in gated for rank in ranks_of(source, vectors, entry) if rank]
    specs = specs_of(source, vectors, gated, others)
    count = sum(ranks) + len(ranks) + len(source.plain_rows) * len(others)
    return count, sum(spec.nbytes for spec in specs.values())


def build_spectrum(
    settings: AdaptSettings,
    vectors: TaskVectors,
    entries: Sequence[Entry],
    workers: Workers,
    content: Sequence[str],
    say: Callable[[str], None],
) -> Spectrum:
    """Decompose, or take from the cache. Matrices are decomposed in parallel, by eigenvectors in float64.

    Args:
        settings: `start` or `vectors`, `kept`, `gated`.
        vectors: base, experts and plan, after a scan.
        entries: the tensors that some expert changed.
        workers: threads.
        content: hashes of the weights, for the cache's key.
        say: told what is computed, and its size.

    Raises:
        UsageError: see `source_of` and `with_gates`.
        NonFiniteError: NaN or infinity, which have no decomposition.
    """
    source = source_of(settings, vectors)
    gated = with_gates(settings, vectors, entries)
    names = {entry.name for entry in gated}
    others = [entry for entry in entries if entry.name not in names]
    specs = specs_of(source, vectors, gated, others)
    nbytes = sum(spec.nbytes for spec in specs.values())
    say(f"singular components: {nbytes / 1e6:.0f} MB in the disk cache (adamerging cache --clear frees it)")

    def split(job: tuple[Entry, Tensor]) -> list[Tensor]:
        entry, stack = job
        return _pieces(source, vectors, entry, stack)

    def fill(writer: TensorWriter) -> None:
        stacks = _stacks(vectors, source.stages, workers, gated)
        for pieces in workers.map(split, stacks):
            for piece in pieces:
                writer.write(piece)
        if source.plain is not None:
            for entry, stack in _stacks(vectors, source.plain, workers, others):
                writer.write(stack.to(specs[entry.name].dtype).contiguous())

    asked = [settings.start, settings.vectors, settings.gated, list(vectors.tasks), list(specs)]
    stored = cached(key("spectrum", asked, list(content)), specs, fill)
    matrices = []
    for entry in gated:
        rank = min(_sides(vectors, entry))
        parts = []
        for row in range(len(source.rows)):
            if f"{entry.name}/{row}/left" in specs:
                left, values, right = (
                    stored[f"{entry.name}/{row}/{what}"] for what in ("left", "values", "right")
                )
                parts.append(Part(row, left, values, right, rank))
        matrices.append(Matrix(entry, stored.get(f"{entry.name}/origin"), tuple(parts)))
    plain = {entry.name: stored[entry.name] for entry in others if entry.name in specs}
    return Spectrum(source, tuple(matrices), plain, nbytes)


def _stacks(
    vectors: TaskVectors, stages: Sequence[Stage], workers: Workers, entries: Sequence[Entry]
) -> Iterator[tuple[Entry, Tensor]]:
    """The stack of each tensor after the stages, ``(S, numel)``."""
    pipeline = Pipeline(vectors, stages, workers)
    for entry in entries:
        pieces = list(workers.map(lambda job: job().stack, pipeline.chunks(entry)))
        yield entry, torch.cat(pieces, 1)


def _pieces(source: Source, vectors: TaskVectors, entry: Entry, stack: Tensor) -> list[Tensor]:
    """What is stored of one tensor with gates, in the order of `specs_of`."""
    matrices = stack.reshape(len(stack), *_sides(vectors, entry))
    if not matrices.isfinite().all():
        raise NonFiniteError(f"{entry.name} holds NaN or infinity; exclude it: no decomposition of it exists")
    ranks = ranks_of(source, vectors, entry)
    found: Sequence[Triplets]
    if source.components is not None:
        found = source.components.split(matrices)
    else:
        found = [leading(matrix, rank) for matrix, rank in zip(matrices, ranks, strict=True)]
    dtype = vectors.dtype(entry)
    pieces = [matrices.mean(0).reshape(-1)] if source.centred else []
    for (left, values, right), rank in zip(found, ranks, strict=True):
        if rank:
            pieces += [left.T, values, right]
    return [piece.to(dtype).contiguous() for piece in pieces]


def _sides(vectors: TaskVectors, entry: Entry) -> tuple[int, int]:
    """A tensor as a matrix: its first dimension, and all others."""
    shape = vectors.shape(entry)
    return (shape[0], prod(shape[1:])) if len(shape) > 1 else (1, prod(shape))


def open_at_first(source: Source, part: Part) -> int:
    """How many of a row's gates are open at the start."""
    if source.kept >= 1:
        return len(part.values)
    return min(len(part.values), max(1, int(source.kept * part.rank)))
