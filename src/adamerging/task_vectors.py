"""Base, experts and plan → the stack of task vectors of one tensor, piece by piece.

The only module that matches the experts' tensors to the base's. It holds no tensor: the pieces are
read from memory-mapped files (or computed from LoRA factors) when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from .blocks import Place, places
from .errors import NonFiniteError
from .methods.stage import Chunk, Scope, row_size
from .plan import Entry, Plan
from .schedule import Schedule, value_at
from .weights.source import Factors, Weights

CHUNK_VALUES = 1 << 19
"""How many values one piece of a stack holds, all experts together: 2 MiB in float32.

Smaller pieces would fit a core's cache better, but threads would then wait for the interpreter's lock.
"""


@dataclass(frozen=True)
class Opened:
    """One tensor of the base and of every expert, open but not read.

    Attributes:
        entry: its line of the plan.
        base: flat view of the base's values, stored dtype.
        experts: for each expert a flat view, LoRA factors, or None where the expert left it unchanged.
    """

    entry: Entry
    base: Tensor
    experts: tuple[Tensor | Factors | None, ...]


@dataclass
class TaskVectors:
    """The task vectors of a merge, in pieces.

    Args:
        plan: what is merged.
        base: the base's weights.
        experts: the experts' weights by task; the order is the order of the rows of every stack.
        weights: weight by expert, see `schedule`.
        chunk_values: values of one piece of a stack, all experts together.
        allow_nonfinite: merge NaN and infinity as they are instead of refusing them.
        statistics: by task and tensor name what a method's `Statistics` are; None where none were gathered.
        on_read: told how many values of each task vector were read, for progress; called from any thread.

    Attributes:
        changed: for each expert the names of the tensors that it was seen to change.
        scanned: every tensor was read, so that those in no `changed` are the base's in every expert.
    """

    plan: Plan
    base: Weights
    experts: Mapping[str, Weights]
    weights: Schedule = 1.0
    chunk_values: int = CHUNK_VALUES
    allow_nonfinite: bool = False
    statistics: Mapping[str, Mapping[str, Tensor]] | None = None
    on_read: Callable[[int], None] | None = None
    places: Mapping[str, Place] = field(init=False)
    tasks: tuple[str, ...] = field(init=False)
    changed: dict[str, set[str]] = field(init=False)
    scanned: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.tasks = tuple(self.experts)
        self.places = places(self.plan.entries)
        self.changed = {task: set() for task in self.tasks}

    def like(self, experts: Sequence[str] | None = None, weights: Schedule | None = None) -> TaskVectors:
        """The same opened weights with some of the experts or other weights; what was seen is kept.

        Args:
            experts: names of those that take part; all when None.
            weights: weight by expert; the same when None.
        """
        names = self.tasks if experts is None else experts
        made = replace(
            self,
            experts={name: self.experts[name] for name in names},
            weights=self.weights if weights is None else weights,
        )
        made.changed = {name: self.changed[name] for name in names}
        made.scanned = self.scanned
        return made

    def informed(self, statistics: Mapping[str, Mapping[str, Tensor]]) -> TaskVectors:
        """The same with statistics of the tasks' inputs."""
        made = self.like()
        made.statistics = statistics
        return made

    def entries(self) -> list[Entry]:
        """The entries that a method merges, in the base's order."""
        return self.plan.with_treatment("merged")

    def numel(self, entry: Entry) -> int:
        """How many values of the tensor are merged (the shared rows, where a vocabulary grew)."""
        return prod(self.shape(entry))

    def shape(self, entry: Entry) -> tuple[int, ...]:
        """Shape of what is merged of the tensor."""
        shape = entry.spec.shape
        return shape if entry.shared_rows is None else (entry.shared_rows, *shape[1:])

    def dtype(self, entry: Entry) -> torch.dtype:
        """The dtype of all arithmetic: float32, or float64 where the base is."""
        return torch.float64 if entry.spec.dtype == torch.float64 else torch.float32

    def open(self, entry: Entry) -> Opened:
        """The tensor, ready to be read in pieces."""
        opened = tuple(self._stored(task, entry.sources.get(task)) for task in self.tasks)
        return Opened(entry, self.base.read(entry.name).reshape(-1), opened)

    def _stored(self, task: str, name: str | None) -> Tensor | Factors | None:
        weights = self.experts[task]
        if name is None:
            return None
        return weights.factors(name) if name in weights.low_rank else weights.read(name).reshape(-1)

    def of_expert(self, entry: Entry, task: str) -> Tensor:
        """What one expert computes with, merged or not: of the base's shape, in the expert's stored dtype.

        Of an adapter it is ``base + change`` in the dtype of all arithmetic, and the base's where the expert
        has nothing of its own; where a vocabulary grew, the rows after the shared ones are the base's.
        """
        base, stored = self.base.read(entry.name), self._stored(task, entry.name_in(task))
        if stored is None:
            return base
        if isinstance(stored, Factors):
            change = _low_rank(stored, 0, entry.spec.numel, self.dtype(entry))
            return base.to(self.dtype(entry)) + change.reshape(base.shape)
        if entry.shared_rows is None:
            return stored.reshape(base.shape)
        shared = self.numel(entry)
        return torch.cat([stored[:shared], base.reshape(-1)[shared:].to(stored.dtype)]).reshape(base.shape)

    def spans(self, entry: Entry, scope: Scope) -> Iterator[tuple[int, int]]:
        """The pieces a tensor is read in: ranges of its flattened values that respect ``scope``."""
        total = self.numel(entry)
        step = max(1, self.chunk_values // max(1, len(self.tasks)))
        size = row_size(self.shape(entry))
        if scope == "tensor":
            step = max(1, total)
        elif scope == "row" or size <= step:
            step = max(size, step // size * size)
        return ((start, min(start + step, total)) for start in range(0, total, step))

    def read(self, opened: Opened, start: int, stop: int) -> Chunk:
        """One piece of the stack of task vectors.

        Raises:
            NonFiniteError: NaN or infinity, with the tensors and experts that hold it.
        """
        entry, dtype = opened.entry, self.dtype(opened.entry)
        base = opened.base[start:stop].to(dtype)
        vectors = torch.empty(len(self.tasks), stop - start, dtype=dtype)
        for row, source in enumerate(opened.experts):
            if source is None:
                vectors[row].zero_()
            elif isinstance(source, Factors):
                vectors[row] = _low_rank(source, start, stop, dtype)
            elif torch.promote_types(source.dtype, dtype) == dtype:
                torch.sub(source[start:stop], base, out=vectors[row])  # converts on the way
            else:
                vectors[row].copy_(source[start:stop]).sub_(base)
        self._inspect(entry, vectors)
        if not any(isinstance(source, Tensor) for source in opened.experts):
            self._inspect_base(base)  # else its NaN are in the differences
        if self.on_read is not None:
            self.on_read(stop - start)
        place = self.places[entry.name]
        weights = torch.tensor(
            [value_at(self.weights, entry.name, place, t) for t in self.tasks], dtype=dtype
        )
        return Chunk(
            entry.name,
            self.shape(entry),
            start,
            stop,
            place,
            self.tasks,
            self.tasks,
            base,
            vectors,
            vectors,
            weights,
            self._statistics(entry.name),
        )

    def _statistics(self, name: str) -> tuple[Tensor | None, ...]:
        if self.statistics is None:
            return ()
        return tuple(self.statistics[task].get(name) for task in self.tasks)

    def _inspect(self, entry: Entry, vectors: Tensor) -> None:
        """Note which experts changed this tensor; refuse NaN and infinity (a sum shows both, cheaply)."""
        for task, row, total in zip(self.tasks, vectors, vectors.sum(1).tolist(), strict=True):
            if total == total and abs(total) != float("inf"):
                if entry.name not in self.changed[task] and (total != 0.0 or bool(row.any())):
                    self.changed[task].add(entry.name)
            elif not self.allow_nonfinite and not bool(row.isfinite().all()):
                raise NonFiniteError(self._describe_nonfinite())
            else:
                self.changed[task].add(entry.name)

    def _inspect_base(self, base: Tensor) -> None:
        if not self.allow_nonfinite and not bool(base.sum().isfinite()) and not bool(base.isfinite().all()):
            raise NonFiniteError(self._describe_nonfinite())

    def _describe_nonfinite(self, most: int = 10) -> str:
        lines = []
        for entry in self.plan.with_treatment("merged", "averaged"):
            opened = self.open(entry)
            for label, source in [("the base", opened.base), *zip(self.tasks, opened.experts, strict=True)]:
                values = (source.left, source.right) if isinstance(source, Factors) else (source,)
                bad = sum(_count_nonfinite(value) for value in values if value is not None)
                if bad:
                    who = label if label == "the base" else f"expert '{label}'"
                    lines.append(f"  - {entry.name} of {who}: {bad} of {entry.spec.numel} values")
        if len(lines) > most:
            lines = [*lines[:most], f"  ... and {len(lines) - most} more"]
        remedy = "Repair or leave out these weights, exclude the tensors, or go on: --allow nonfinite."
        return "\n".join(["NaN or infinity in weights that were to be merged:", *lines, remedy])

    def unchanged(self) -> Sequence[str]:
        """Names of merged tensors that turned out to be the base's in every expert (after a full read)."""
        return [
            entry.name
            for entry in self.entries()
            if not any(entry.name in names for names in self.changed.values())
        ]


def _count_nonfinite(values: Tensor, step: int = 1 << 22) -> int:
    if not values.is_floating_point():
        return 0
    flat = values.reshape(-1)
    return sum(int((~flat[i : i + step].isfinite()).sum()) for i in range(0, len(flat), step))


def _low_rank(factors: Factors, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Values ``[start, stop)`` of the flattened ``scale · left @ right``; forms only the rows they lie in."""
    columns = factors.right.shape[1]
    first, last = start // columns, -(-stop // columns)
    rows = (factors.left[first:last].to(dtype) * factors.scale) @ factors.right.to(dtype)
    return rows.reshape(-1)[start - first * columns : stop - first * columns]
