"""Run the stages of a method over all tensors, in pieces, on all cores, in order.

Results come back in the order of the tensors, so that files are written front to back and sums of
floats do not depend on which thread was first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from .allocator import keep_freed_memory
from .errors import UsageError
from .methods.stage import REDUCED, SCOPES, Chunk, Scope, Stage, row_size, run_stages
from .plan import Entry
from .schedule import Schedule, value_at
from .task_vectors import Opened, TaskVectors

T = TypeVar("T")
S = TypeVar("S")

_LEAST = 256
"""A sample takes so many values of a chunk: fewer would cost as much."""


class Workers:
    """A pool of threads that maps in order with a bounded number of results in flight.

    Each thread computes on one core; torch's own threads would only get in the way of pieces this small.
    """

    def __init__(self, count: int | None = None) -> None:
        keep_freed_memory()
        self.count = count or torch.get_num_threads()
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.count, "merge", initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
        """``function`` of every item, in the items' order; items are drawn only as results are taken."""
        pending: deque[Future[T]] = deque()
        try:
            for item in items:
                pending.append(self._pool.submit(function, item))
                if len(pending) > 2 * self.count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


@dataclass(frozen=True)
class StackStream:
    """The `methods.stage.Stream` over some tensors, after some stages."""

    vectors: TaskVectors
    workers: Workers
    stages: Sequence[Stage]
    model_states: Sequence[Any]
    entries: Sequence[Entry]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the rows of the stack: the experts, or `REDUCED` after a reducer."""
        return self.vectors.tasks if all(stage.keeps_tasks for stage in self.stages) else REDUCED

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stack; float64 as soon as one tensor is."""
        return (
            torch.float64
            if any(self.vectors.dtype(entry) == torch.float64 for entry in self.entries)
            else torch.float32
        )

    @property
    def weights(self) -> Tensor:
        """``(S,)`` weights of the rows of the stack, in a stream of one tensor."""
        if self.tasks is REDUCED or len(self.entries) != 1:
            return torch.ones(len(self.tasks), dtype=self.dtype)
        return torch.tensor(self.settings(self.vectors.weights), dtype=self.dtype)

    def numel(self) -> int:
        """Elements of one task vector over all chunks."""
        return sum(self.vectors.numel(entry) for entry in self.entries)

    def settings(self, schedule: Schedule) -> list[float]:
        """A schedule's value for each row of the stack."""
        return [self._value(schedule, task) for task in self.tasks]

    def setting(self, schedule: Schedule) -> float:
        """The value of a schedule that does not differ by expert."""
        return self._value(schedule, None)

    def _value(self, schedule: Schedule, task: str | None) -> float:
        name = self.entries[0].name
        if len(self.entries) == 1:
            return value_at(schedule, name, self.vectors.places[name], task)
        chosen = schedule[task] if isinstance(schedule, dict) and task in schedule else schedule
        if not isinstance(chosen, (int, float)):
            raise UsageError(
                "a setting that applies to the whole model at once cannot vary by name or depth; "
                "use a number, or scope: tensor where the method has it"
            )
        return float(chosen)

    def map(self, function: Callable[[Chunk], T]) -> Iterator[T]:
        """Apply ``function`` to every chunk, in parallel; results come in the chunks' order."""
        return self.workers.map(lambda job: function(_last(self.stages, job)), self._jobs())

    def sample(self, function: Callable[[Chunk], T], values: int) -> Iterator[T]:
        """Apply ``function`` to the begin of chunks all over, about ``values`` values of each row or more."""
        total = max(1, self.numel())
        chunks = total * len(self.vectors.tasks) // self.vectors.chunk_values
        every = max(1, chunks * _LEAST // values)
        share = every * values / total

        def begin(job: _Job) -> _Job:
            length = job.stop - job.start
            whole = 1 if self._scope == "element" else row_size(job.opened.entry.spec.shape)
            wanted = length if self._scope == "tensor" else max(_LEAST, int(length * share) + 1)
            return replace(job, stop=min(job.stop, job.start + -(-wanted // whole) * whole))

        return self.workers.map(
            lambda job: function(_last(self.stages, job)),
            (begin(job) for job in islice(self._jobs(), 0, None, every)),
        )

    @property
    def _scope(self) -> Scope:
        return max((stage.scope for stage in self.stages), key=SCOPES.index, default="element")

    def _jobs(self) -> Iterator[_Job]:
        for entry in self.entries:
            yield from jobs(self.vectors, self.workers, self.stages, self.model_states, entry, self._scope)


@dataclass(frozen=True, slots=True)
class _Job:
    vectors: TaskVectors
    opened: Opened
    start: int
    stop: int
    states: Sequence[Any]


def jobs(
    vectors: TaskVectors,
    workers: Workers,
    stages: Sequence[Stage],
    model_states: Sequence[Any],
    entry: Entry,
    scope: Scope,
) -> Iterator[_Job]:
    """The pieces of one tensor, after the surveys of that tensor which its stages ask for."""
    states: list[Any] = []
    for number, stage in enumerate(stages):
        if stage.survey is None or stage.per == "model":
            states.append(model_states[number])
        else:
            states.append(stage.survey(StackStream(vectors, workers, stages[:number], states, [entry])))
    opened = vectors.open(entry)
    for start, stop in vectors.spans(entry, scope):
        yield _Job(vectors, opened, start, stop, states)


def _last(stages: Sequence[Stage], job: _Job) -> Chunk:
    return run_stages(stages, job.states, job.vectors.read(job.opened, job.start, job.stop))


class Pipeline:
    """A method, surveyed over the whole model and ready to run tensor by tensor.

    Args:
        vectors: the task vectors.
        stages: what to do to them.
        workers: the threads to do it with.
    """

    def __init__(self, vectors: TaskVectors, stages: Sequence[Stage], workers: Workers) -> None:
        self.vectors, self.stages, self.workers = vectors, tuple(stages), workers
        self.scope: Scope = max((stage.scope for stage in stages), key=SCOPES.index, default="element")
        self.states: list[Any] = []
        for number, stage in enumerate(self.stages):
            state = None
            if stage.survey is not None and stage.per == "model" and vectors.entries():
                earlier = self.stages[:number]
                state = stage.survey(
                    StackStream(vectors, workers, earlier, list(self.states), vectors.entries())
                )
            self.states.append(state)

    def chunks(self, entry: Entry) -> Iterator[Callable[[], Chunk]]:
        """The pieces of one tensor, each a function that computes it; run them with `Workers.map`."""
        for job in jobs(self.vectors, self.workers, self.stages, self.states, entry, self.scope):
            yield partial(_last, self.stages, job)
