"""Make the working body a model of the comparison: base, expert, average, static merge, learned merge."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..adaptation.adapt import add_operations, fill_merged, learned_parameters, own_statistics, run_warnings
from ..adaptation.coefficients import table
from ..adaptation.loop import Learner, estimate_statistics, own_of_each, taken_statistics
from ..adaptation.own_parts import Parts, own_warnings
from ..adaptation.scoring import average_into
from ..adaptation.session import Session, applied_values, begin, learn, make_learner
from ..adaptation.settings import resolve
from ..adaptation.statistics import Gathering, gather
from ..errors import UsageError
from ..masks import fill_task, task_scales
from ..merging import check_method
from ..run import Prepared, merge_into, statistics_warning
from ..tasks.task import Task
from .bench import Bench
from .entries import Candidate

ROUNDS = 16
"""Batches of every task that BatchNorm statistics are estimated on, as a merge with data does."""

PER_TASK = "no single model: each task has weights of its own, found by its mask, and needs the task's name"


@dataclass(frozen=True)
class Made:
    """How the body came to be a model.

    Attributes:
        again: makes the body that model once more, without learning again.
        adapted: inputs of the tasks were used.
        labelled: their labels too.
        warnings: what a reader should know.
        history: records of learning.
        coefficients: what was learned, see `records.Row`.
        parameters: how many numbers that is.
        own: makes the body the model of one task, where each task has one; again a merged body with a task
            that none was made for.
        operations: a part that each task has of its own: surgery before its head, or a learned head.
    """

    again: Callable[[], None]
    adapted: bool = False
    labelled: bool = False
    warnings: Sequence[str] = ()
    history: Sequence[Mapping[str, Any]] = ()
    coefficients: Mapping[str, Any] | None = None
    parameters: int | None = None
    seconds: float = field(default=0.0)
    own: Callable[[str], None] | None = None
    operations: Parts = field(default_factory=dict)

    @property
    def per_task(self) -> bool:
        """Whether each task has a model, or a part of one, of its own."""
        return self.own is not None or bool(self.operations)

    @contextmanager
    def model_for(self, task: str, bench: Bench, model: str) -> Iterator[str]:
        """Get the body ready to be scored on a task, and back; gives its fingerprint.

        Args:
            task: that comes next.
            bench: with the body.
            model: fingerprint of the body as it was made.
        """
        if self.own is not None:
            self.own(task)
            model = bench.fingerprint()
        operation = self.operations.get(task)
        if operation is None:
            yield model
            return
        vectors, seat = bench.prepared.vectors, bench.seats[task]
        own = operation.attach(seat.task, seat.module, vectors.experts[task], vectors.base)
        bench.seats[task] = replace(seat, task=own)
        try:
            operation.on = True
            yield f"{model} {operation.fingerprint}"
        finally:
            operation.detach()
            bench.seats[task] = seat


@dataclass(frozen=True)
class Maker:
    """Makes models of some of the experts in a bench's body.

    Args:
        bench: weights and body.
        experts: which take part, in order.
        tasks: their data by expert; the bench's own where missing.
        say: told what takes time.
    """

    bench: Bench
    experts: Sequence[str]
    tasks: Mapping[str, Task] = field(default_factory=dict)
    say: Callable[[str], None] = lambda _: None

    def base(self) -> Made:
        """The base itself."""
        return self._timed(lambda: self.bench.body.load_base(self.bench.prepared.vectors))

    def expert(self, name: str) -> Made:
        """One expert."""
        return self._timed(lambda: self.bench.body.load_expert(self.bench.prepared.vectors, name))

    def average(self) -> Made:
        """The plain mean of the experts, BatchNorm statistics re-estimated where data is at hand."""
        assert self.bench.scanned
        prepared = self.bench.restricted(self.experts)

        def fill() -> None:
            average_into(self.bench.body, prepared.vectors, self.bench.workers)

        return self._merged(prepared, fill)

    def merge(self, candidate: Candidate, state: Path | None = None) -> Made:
        """A static or a learned merge.

        Args:
            candidate: what to make.
            state: where a learned one saves its state, and goes on from.

        Raises:
            AdamergingError: it cannot be made, see `run.merge` and `adaptation.adapt`.
        """
        assert self.bench.scanned
        prepared = self.bench.restricted(self.experts)
        vectors = prepared.vectors.like(weights=_weights(candidate.settings.weights, self.experts))
        prepared = replace(prepared, settings=candidate.settings, vectors=vectors)
        if candidate.method is None:
            return self._learned(prepared, candidate, state)
        prepared = replace(prepared, method=candidate.method)
        check_method(candidate.method, vectors, candidate.settings.scale)
        started = time.perf_counter()
        informed = self._informed(prepared)
        seconds = time.perf_counter() - started
        merged = self._merged(
            informed,
            lambda: merge_into(self.bench.body.tensors, informed, self.bench.workers),
            keeps_statistics=candidate.keeps_statistics or candidate.masked,
        )
        if candidate.method.statistics is not None:
            merged = replace(merged, adapted=True, seconds=seconds + merged.seconds)
        return self._masked(informed, merged) if candidate.masked else merged

    def _informed(self, prepared: Prepared) -> Prepared:
        """The same with what the method must know of the tasks' inputs."""
        if prepared.method.statistics is None:
            return prepared
        bench, settings = self.bench, prepared.settings
        weights = dict(zip(("", *bench.prepared.vectors.tasks), bench.content[1], strict=True))
        content = [weights[name] for name in ("", *self.experts)]
        tasks = list(self._data().values())
        given = Gathering(
            prepared.vectors, bench.body, tasks, bench.modules, content, bench.workers, self.say
        )
        vectors, _ = gather(given, prepared.method, settings.chain(), settings.scale)
        return replace(prepared, vectors=vectors)

    def _masked(self, prepared: Prepared, merged: Made) -> Made:
        """A model for each task, from one vector and the task's mask."""
        tensors, workers = self.bench.body.tensors, self.bench.workers
        started = time.perf_counter()
        scales = task_scales(prepared, workers)
        seconds = merged.seconds + time.perf_counter() - started

        def own(task: str) -> None:
            if task in scales:
                fill_task(tensors, prepared, workers, task, scales[task])
            else:
                merged.again()

        return replace(merged, own=own, seconds=seconds, warnings=[*merged.warnings, PER_TASK])

    def _data(self) -> dict[str, Task]:
        return {
            name: self.tasks.get(name, self.bench.seats[name].task)
            for name in self.experts
            if name in self.bench.seats
        }

    def _merged(
        self, prepared: Prepared, fill: Callable[[], None], *, keeps_statistics: bool = False
    ) -> Made:
        """Fill, and re-estimate BatchNorm statistics where every expert has data, as a merge does.

        Args:
            prepared: of these experts.
            fill: makes the body the merge.
            keeps_statistics: leave them as they were merged all the same.
        """
        refresh = None if keeps_statistics else self.refresher(prepared)

        def again() -> None:
            fill()
            if refresh is not None:
                refresh()

        own = prepared.own_statistics
        made = replace(
            self._timed(again),
            adapted=refresh is not None,
            warnings=statistics_warning(prepared) if own or refresh is None else [],
        )
        return self._with_own(made, prepared) if own else made

    def _with_own(self, made: Made, prepared: Prepared) -> Made:
        """The same with BatchNorm statistics of each task's own: re-estimated; without data the expert's."""
        started, body = time.perf_counter(), self.bench.body
        learners = self._learners(prepared, self._data()) if made.adapted else []
        common, found = taken_statistics(body), own_of_each(learners, prepared.vectors, body, ROUNDS)

        def own(task: str) -> None:
            body.load_statistics(found.get(task, common))

        return replace(made, own=own, seconds=made.seconds + time.perf_counter() - started)

    def refresher(self, prepared: Prepared, rounds: int = ROUNDS) -> Callable[[], None] | None:
        """What re-estimates the body's BatchNorm statistics; None without such, or without all experts' data.

        Args:
            prepared: of these experts.
            rounds: batches of every task.
        """
        tasks = self._data()
        averaged = bool(prepared.plan.with_treatment("averaged"))
        if not averaged or not all(name in tasks and tasks[name].adapt for name in self.experts):
            return None
        learners = self._learners(prepared, tasks)
        return lambda: estimate_statistics(learners, self.bench.body, rounds)

    def _learners(self, prepared: Prepared, tasks: Mapping[str, Task]) -> list[Learner]:
        settings, modules = resolve({"preset": "paper"}), self.bench.modules
        return [
            make_learner(task, self.bench.body, prepared, settings, modules[name])
            for name, task in tasks.items()
        ]

    def _learned(self, prepared: Prepared, candidate: Candidate, state_file: Path | None) -> Made:
        bench, settings = self.bench, candidate.adapt
        assert settings is not None
        lacking = [name for name in self.experts if name not in bench.seats]
        if lacking:
            raise UsageError(f"no data to learn from for {', '.join(lacking)}; give them under tasks")
        started = time.perf_counter()
        settings = settings.model_copy(update={"device": str(bench.device)})
        if settings.route is not None:
            from ..routing.comparing import learned_routes

            return learned_routes(bench, self._data().values(), prepared, settings, state_file, self.say)
        bench.plain()
        session = begin(
            prepared, self._data().values(), settings, bench.workers, self.say, body=bench.body,
            modules=bench.modules, hashes=bench.hashes,
        )  # fmt: skip
        try:
            state = learn(session, state_file=state_file)
        finally:
            bench.body.train_only(set())
            bench.body.clear_gradients()
        applied = applied_values(session, state.values)

        def again() -> None:
            bench.plain()
            fill_merged(session, state, applied)

        operations = add_operations(session, state, applied, self.say)
        own = own_statistics(session, state)
        for operation in operations.values():
            operation.detach()
        again()
        return Made(
            again,
            adapted=True,
            labelled=session.objective.target == "labels",
            warnings=[*run_warnings(session, state, applied), *own_warnings(session)],
            history=state.history,
            coefficients=_coefficients(
                session, table(session.parametrisation.coefficients(applied), session.where)
            ),
            parameters=learned_parameters(session, state, applied, operations),
            seconds=time.perf_counter() - started,
            operations=operations,
            own=(lambda task: bench.body.load_statistics(own.get(task, {}))) if own else None,
        )

    def _timed(self, fill: Callable[[], None]) -> Made:
        def again() -> None:
            self.bench.plain()
            fill()

        started = time.perf_counter()
        again()
        return Made(again, seconds=time.perf_counter() - started)


def _weights(weights: Any, experts: Sequence[str]) -> Any:
    """Weights by expert of those that take part."""
    if not isinstance(weights, Mapping):
        return weights
    return {name: value for name, value in weights.items() if name in experts}


def _coefficients(session: Session, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was learned, by row of the stack and group; of coefficients by row the mean a tensor."""
    places = session.prepared.vectors.places
    groups = [str(row["group"]) for row in rows]
    by_block = session.settings.granularity == "block"
    return {
        "granularity": session.settings.granularity,
        "tasks": list(session.where.rows),
        "groups": groups,
        "blocks": [
            places[group].block if group in places else group if by_block else None for group in groups
        ],
        "values": [[row[task] for row in rows] for task in session.where.rows],
    }
