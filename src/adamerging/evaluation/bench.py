"""What every row of a comparison is made and scored on: weights opened once, one working body, ready data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adaptation.body import Body
from ..adaptation.cache import content_of, fingerprint, own_fingerprint
from ..adaptation.cache import key as content_key
from ..adaptation.loop import autocast
from ..adaptation.session import content_of_task, hash_files, make_device
from ..adaptation.settings import settled_precision
from ..adaptation.store import VectorStore
from ..run import Prepared
from ..stream import Workers
from ..tasks.task import Samples, Task
from ..weights import Weights
from ..weights.fingerprint import sha256_file
from .cache import Result, find, keep, result_key
from .inference import Feed, logits_from
from .limit import first
from .records import CLEAN, ScoreRecord
from .scores import labelled, measure, score_record
from .settings import CompareSettings
from .shift import conditions

PLAN = frozenset({"include", "exclude", "heads", "buffers", "vocabulary", "dtype"})
"""Settings that say which tensors are merged, and which of a model's stay the base's."""
KEPT = 512 << 20
"""Bytes of ready inputs that are kept from one model to the next, of all tasks together."""


@dataclass(frozen=True)
class Scored:
    """One model on one task under one condition.

    Attributes:
        record: its numbers, not normalised yet.
        result: what they were computed from.
    """

    record: ScoreRecord
    result: Result


@dataclass(frozen=True)
class Seat:
    """A task with its module, whose body is the working one.

    Attributes:
        task: as it is scored, its evaluation data cut to the limit.
        module: the model.
        head: fingerprint of what is its own.
        unseen: it is scored as one that no expert behind the models has seen.
    """

    task: Task
    module: nn.Module
    head: str
    unseen: bool = False


@dataclass(frozen=True)
class Addition:
    """What a model has put into the tasks' modules beside the body.

    Attributes:
        remove: takes it out again.
        fingerprint: of it.
    """

    remove: Callable[[], None]
    fingerprint: str


class Bench:
    """Opened weights, one working body, and the tasks attached to it.

    Attributes:
        seats: the experts' tasks by name, each with its own module over the body.
        outside: tasks that are scored without their expert by name (see `outsiders`), each with the module
            of another task and a head of its own; a task that is left out of a group is in both.
        addition: what the model that was made last has beside its body; None where it is the body alone.

    Args:
        prepared: base, experts and plan, opened once for all rows.
        tasks: with their data; one module each is built and attached.
        settings: how to score.
        workers: threads.
        device: where the body lives.

    Raises:
        UsageError: labels outside a head's range, tokenizers that do not fit, a device that is none.
        WeightsError: a task's module cannot be built.
    """

    def __init__(
        self,
        prepared: Prepared,
        tasks: Sequence[Task],
        settings: CompareSettings,
        workers: Workers,
        device: str = "cpu",
    ) -> None:
        self.prepared, self.workers = prepared, workers
        vectors = prepared.vectors
        self.device = make_device(device)
        precision = settled_precision(settings.precision, str(self.device))
        self.settings = settings.model_copy(update={"precision": precision})
        self.hashes = hash_files([vectors.base, *vectors.experts.values()], workers)
        self.body = Body(vectors, self.device)
        self.addition: Addition | None = None
        self.seats: dict[str, Seat] = {}
        self.outside: dict[str, Seat] = {}
        self._feeds: dict[tuple[str, str, bool], Feed] = {}
        self._known: dict[tuple[Any, ...], Result] = {}
        for task in tasks:
            self._attach(task)

    def _attach(self, task: Task) -> None:
        """Build a task's module over the working body."""
        vectors = self.prepared.vectors
        expert = vectors.experts[task.name]
        module = self.body.attach(task.name, task.skeleton(expert, vectors.base))
        head = own_fingerprint(module, self.body.tensors.values(), expert)
        evaluate = task.evaluate and first(task.evaluate, self.settings.limit)
        self.seats[task.name] = Seat(replace(task, evaluate=evaluate), module, head)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Modules by task."""
        return {name: seat.module for name, seat in self.seats.items()}

    @cached_property
    def scanned(self) -> bool:
        """Read base and experts once, which finds the tensors that no expert changed."""
        VectorStore(self.prepared.vectors, self.workers).scan()
        return True

    def content_of(self, weights: Sequence[Weights]) -> list[Any]:
        """What identifies each of these weights; every file is hashed once."""
        unknown = [item for item in weights if not self.hashes.keys() >= set(item.files)]
        self.hashes |= hash_files(unknown, self.workers)
        return [content_of(item, self.hashes) for item in weights]

    def hash_of(self, path: Path) -> str | None:
        """sha256 of a file that settings name; None where there is none."""
        if path not in self.hashes and path.is_file():
            self.hashes[path] = sha256_file(path)
        return self.hashes.get(path)

    @cached_property
    def content(self) -> list[Any]:
        """What identifies weights, data and, where it is no usual one, the plan, for the rows' keys."""
        vectors = self.prepared.vectors
        weights = self.content_of([vectors.base, *vectors.experts.values()])
        tasks = [_content(name, seat) for name, seat in self.seats.items()]
        plan = self.prepared.settings.model_dump(include=set(PLAN), exclude_defaults=True)
        return [list(vectors.tasks), weights, tasks, *([plan] if plan else [])]

    @cached_property
    def content_outside(self) -> dict[str, Any]:
        """What identifies the tasks outside and their heads, by name, for the rows' keys."""
        return {name: _content(name, seat) for name, seat in self.outside.items()}

    def restricted(self, experts: Sequence[str]) -> Prepared:
        """The same merge of some of the experts: nothing is opened again."""
        related = {name: self.prepared.relatedness[name] for name in experts}
        return replace(self.prepared, vectors=self.prepared.vectors.like(experts), relatedness=related)

    def fingerprint(self) -> str:
        """Of the body as it is now, and of what the modules have beside it."""
        found = fingerprint(self.body.tensors)
        return found if self.addition is None else content_key(found, self.addition.fingerprint)

    def plain(self) -> None:
        """Take what the last model had beside its body out of the modules."""
        if self.addition is not None:
            self.addition.remove()
            self.addition = None

    def scored_tasks(self) -> list[str]:
        """Names of the tasks with labelled data, in order."""
        return [name for name, seat in self.seats.items() if seat.task.evaluate is not None]

    def conditions(self, name: str) -> Iterator[tuple[str, Samples]]:
        """The corrupted copies of a task's evaluation data, made as they are asked for."""
        shift, task = self.settings.shift, self.seats[name].task
        if shift is None or task.evaluate is None or (shift.tasks is not None and name not in shift.tasks):
            return
        yield from conditions(task, shift)

    def score(
        self,
        model: str,
        name: str,
        samples: Samples | None = None,
        condition: str = CLEAN,
        *,
        under: str | None = None,
        unseen: bool = False,
        logits: bool = False,
    ) -> Scored:
        """Score the body as it is now on one task.

        Args:
            model: the body's fingerprint.
            name: the task.
            samples: its evaluation data when None.
            condition: what they are.
            under: the task whose module answers; the task's own when None.
            unseen: the task counts as one that no expert saw, under the head that it has outside.
            logits: they are wanted, not only what is computed from them.

        Raises:
            UsageError: no labels.
            NonFiniteError: NaN or infinity among the logits.
        """
        seats = self.outside if unseen else self.seats
        seat = seats[under or name]
        own = samples is None
        samples = labelled(name, seats[name].task.evaluate if samples is None else samples)
        # The code of a module task has no fingerprint; within one run it is the same.
        known = (model, seat.head, seat.task.name, samples.fingerprint)
        key = result_key(model, seat.head, seat.task, samples, self.settings.precision)
        result = find(key, len(samples), logits=logits) or (None if logits else self._known.get(known))
        if result is None:
            feed = self._feed(seat, name, samples, own)
            with autocast(self.settings, self.body):
                found = logits_from(seat.module, seat.task, feed, self.device)
            result = Result(measure(found, samples), found.argmax(-1), found if logits else None)
            keep(key, result)
            self._known[known] = replace(result, logits=None)
        bootstrap = self.settings.bootstrap
        return Scored(score_record(name, result.metrics, bootstrap, condition, unseen=unseen), result)

    def _feed(self, seat: Seat, name: str, samples: Samples, own: bool) -> Feed:
        if not own:
            return Feed(seat.task, samples)
        names = (seat.task.name, name, seat.unseen)
        if names not in self._feeds:
            room = KEPT // (len(self.seats) + len(self.outside)) if seat.task.name == name else 0
            self._feeds[names] = Feed(seat.task, samples, keep=room)
        return self._feeds[names]

    def answers(self, expert: str) -> Iterator[tuple[str, str]]:
        """The other tasks that an expert can answer, each with the task whose module does.

        Where a head is no part of the weights (zero-shot), every body can answer under it. Else the expert's
        own head answers tasks that have the very same classes.
        """
        plan = self.prepared.plan
        for name in self.scored_tasks():
            if name == expert:
                continue
            kinds = [self.seats[task].task.kind for task in (expert, name)]
            if kinds[0] != kinds[1]:
                continue
            if not plan.heads.get(name) and not plan.heads.get(expert):
                yield name, name
            elif _classes(self.seats[expert]) and _classes(self.seats[expert]) == _classes(self.seats[name]):
                yield name, expert

    def labels(self, name: str) -> Tensor:
        """Class numbers of a task's evaluation data."""
        samples = self.seats[name].task.evaluate
        assert samples is not None and samples.labels is not None
        return torch.tensor([int(label) for label in samples.labels])


def class_names_of(seat: Seat) -> list[str] | None:
    """Names of a task's classes by number, where known."""
    if seat.task.label_names is not None:
        return [str(name) for name in seat.task.label_names]
    from ..tasks.labels import class_names

    config: Any = getattr(seat.module, "config", None)
    return class_names(config.to_dict()) if hasattr(config, "to_dict") else None


def _classes(seat: Seat) -> list[str] | None:
    names = class_names_of(seat)
    return None if names is None else [" ".join(name.casefold().split()) for name in names]


Reference = tuple[str, str, bool]
"""Task, condition, and whether it is scored as unseen."""


def reference_of(record: ScoreRecord) -> Reference:
    """What a score is measured by."""
    return record.task, record.condition, record.unseen


def normalised(records: Sequence[ScoreRecord], references: Mapping[Reference, float]) -> list[ScoreRecord]:
    """The records with their accuracy over that of the reference.

    Args:
        records: of one model.
        references: accuracy of each task's expert, or of the base where the task is unseen.
    """
    found = []
    for record in records:
        reference = references.get(reference_of(record), 0.0)
        share = record.accuracy / reference if reference else None
        found.append(record.model_copy(update={"normalised": share}))
    return found


def _content(name: str, seat: Seat) -> list[Any]:
    """What identifies a task's head and data."""
    own = (seat.task.adapt, seat.task.evaluate)
    return [
        name,
        seat.head,
        *(content_of_task(seat.task, part) if part is not None else None for part in own),
    ]
