"""Run each expert over its task's unlabeled inputs, one after the other in one working body.

What is found is kept on disk by content, and comes back as views of files: the statistics of all experts are
never in private memory together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import NonFiniteError
from ...merging import fill, lacking_data
from ...methods.stage import Method, Statistics
from ...stream import Pipeline, Workers
from ...task_vectors import TaskVectors
from ...tasks.task import Inputs, Task
from ..batches import some
from ..body import Body
from ..cache import computed, fingerprint, key, own_fingerprint
from .fisher import fisher_of
from .grams import Grams
from .linear_maps import LinearMaps, Use
from .order import Order, order_of

_BATCH = 32


@dataclass(frozen=True)
class Gathering:
    """What statistics are gathered with.

    Attributes:
        vectors: base, experts and plan.
        body: the working body.
        tasks: with their data.
        modules: by task, attached to the body.
        content: what identifies the weights of the base, and of each expert in order.
        workers: threads.
        say: told what takes time.
    """

    vectors: TaskVectors
    body: Body
    tasks: Sequence[Task]
    modules: Mapping[str, nn.Module]
    content: Sequence[Any]
    workers: Workers
    say: Callable[[str], None] = field(default=lambda _: None)


def gather(given: Gathering, method: Method, asked: Any, scale: Any = None) -> tuple[TaskVectors, list[str]]:
    """The task vectors with what the method must know of the tasks' inputs.

    Args:
        given: what to gather with; the body ends as the base.
        method: the method or chain.
        asked: how it was asked for, with its options, as plain data.
        scale: λ of the merge; the method's own when None.

    Returns:
        The vectors, and what identifies the statistics of each task.

    Raises:
        UsageError: tasks without unlabeled inputs, all named.
        NonFiniteError: activations or gradients are NaN or infinite.
    """
    wanted, vectors = method.statistics, given.vectors
    if wanted is None:
        return vectors, []
    check_tasks(method, vectors, given.tasks)
    by_name = {task.name: task for task in given.tasks}
    runs = [_Run(given, wanted, by_name[name], row) for row, name in enumerate(vectors.tasks)]
    found: dict[str, Mapping[str, Tensor]] = {}
    if wanted.sequential:
        names = [run.identity(asked, scale, vectors.weights, list(given.content)) for run in runs]
        found |= _block_by_block(given, runs, names, method, scale)
    else:
        names = [run.identity() for run in runs]
        for run, name in zip(runs, names, strict=True):
            found[run.task.name] = computed(name, run.alone)
    given.body.reset(vectors)
    known = [name or fingerprint(found[run.task.name]) for run, name in zip(runs, names, strict=True)]
    return vectors.informed(found), known


def check_tasks(method: Method, vectors: TaskVectors, tasks: Sequence[Task]) -> None:
    """Refuse a method that needs statistics, where a task has no unlabeled inputs.

    Raises:
        UsageError: names all such tasks.
    """
    lacking = without_inputs(vectors, tasks)
    if method.statistics is not None and lacking:
        raise lacking_data(method, lacking)


def without_inputs(vectors: TaskVectors, tasks: Sequence[Task]) -> list[str]:
    """Experts whose task has no unlabeled inputs, in order."""
    ready = {task.name for task in tasks if task.adapt}
    return [name for name in vectors.tasks if name not in ready]


@dataclass(frozen=True)
class _Run:
    """One expert and its task."""

    given: Gathering
    wanted: Statistics
    task: Task
    row: int

    @property
    def module(self) -> nn.Module:
        return self.given.modules[self.task.name]

    def identity(self, *more: Any) -> str | None:
        """What its statistics are stored under; None for a task whose code has no fingerprint."""
        from ..session import content_of_task

        if self.task.has_code:
            return None
        given = self.given
        expert = given.vectors.experts[self.task.name]
        return key(
            "statistics",
            asdict(self.wanted),
            [given.content[0], given.content[self.row + 1]],
            content_of_task(self.task, self.task.adapt),
            own_fingerprint(self.module, given.body.tensors.values(), expert),
            sorted(given.vectors.plan.entries),
            *more,
        )

    def alone(self) -> Mapping[str, Tensor]:
        """The statistics of the expert as it is."""
        given = self.given
        given.say(f"statistics of expert '{self.task.name}' on {len(self.samples())} samples")
        given.body.load_expert(given.vectors, self.task.name)
        if self.wanted.kind == "gram":
            return self.grams()
        names = [entry.name for entry in given.vectors.entries()]
        found = fisher_of(
            self.task, self.module, given.body, names, self.samples(),
            labels=self.wanted.labels, seed=self.wanted.seed,
        )  # fmt: skip
        return self._finite(found, "gradient")

    def in_merged(self, order: Order, number: int) -> Mapping[str, Tensor]:
        """The Gram matrices of one group of the expert's tensors, in a body that is merged before it."""
        given, names = self.given, order.groups[number]
        given.say(f"statistics of expert '{self.task.name}', part {number + 1} of {len(order.groups)}")
        given.body.load_expert(given.vectors, self.task.name, set(names))
        return self.grams(names, lambda name: order.is_after(name, number))

    def grams(
        self, names: Sequence[str] | None = None, stop: Callable[[str], bool] = lambda _: False
    ) -> Mapping[str, Tensor]:
        """Gram matrices of the body as it is now.

        Args:
            names: of the weights of interest; all when None.
            stop: whether a forward pass may end before the map of this weight.
        """
        found = Grams(names)

        def use(seen: Use) -> None:
            if stop(seen.name):
                raise _Enough
            found.add(seen)

        for batch in self.batches(self.samples()):
            found.begin(batch.get("attention_mask"))
            self.forward(batch, use, found.look_up)
        return self._finite(found.means(), "input")

    def forward(
        self, batch: Inputs, use: Callable[[Use], None], look_up: Callable[[str], None] = lambda _: None
    ) -> None:
        """One forward pass that tells of its linear maps, until `use` has seen enough."""
        with torch.no_grad(), LinearMaps(self.given.body.tensors, use, look_up):
            try:
                self.task.forward(self.module, batch)
            except _Enough:
                return

    def samples(self) -> list[int]:
        """Numbers of the samples to look at."""
        assert self.task.adapt is not None
        return some(len(self.task.adapt), self.wanted.samples, self.wanted.seed, self.task.name)

    def batches(self, samples: Sequence[int]) -> Iterator[Inputs]:
        """These samples, like with like, so that little is padded."""
        assert self.task.adapt is not None
        order = list(samples)
        if self.task.costs is not None:
            costs = list(self.task.costs(self.task.adapt))
            order.sort(key=costs.__getitem__)
        for start in range(0, len(order), _BATCH):
            rows = [self.task.adapt.inputs[number] for number in order[start : start + _BATCH]]
            yield {name: value.to(self.given.body.device) for name, value in self.task.collate(rows).items()}

    def _finite(self, found: Mapping[str, Tensor], what: str) -> Mapping[str, Tensor]:
        bad = [name for name, values in found.items() if not values.isfinite().all()]
        if bad:
            raise NonFiniteError(
                f"expert '{self.task.name}', on the data of its task, has NaN or infinity in a {what} of "
                f"{', '.join(bad[:5])}"
            )
        return found


class _Enough(Exception):  # noqa: N818 - ends a forward pass, no error
    """All that was asked of a forward pass has been seen."""


def _block_by_block(
    given: Gathering, runs: Sequence[_Run], identities: Sequence[str | None], method: Method, scale: Any
) -> dict[str, dict[str, Tensor]]:
    """Gram matrices of each block on inputs from the merged earlier blocks, and in the end all of them.

    The body is the merge as far as it is known. For each block every expert in turn puts its own block in and
    runs to its end; then the block is merged.
    """
    body, vectors = given.body, given.vectors
    others = None if None in identities else identities  # the inputs of one depend on the data of all
    order = _order(given, runs)
    found: dict[str, dict[str, Tensor]] = {run.task.name: {} for run in runs}
    pipeline = Pipeline(vectors.informed(found), method.stages, given.workers)
    factor = method.scale if scale is None else scale
    body.reset(vectors)
    fill(body.tensors, pipeline, order.rest, scale=factor)
    for number, names in enumerate(order.groups):
        for run in runs:
            name = None if others is None else key("block", others, list(names), run.task.name)
            found[run.task.name].update(computed(name, partial(run.in_merged, order, number)))
        fill(body.tensors, pipeline, names, scale=factor)
    return found


def _order(given: Gathering, runs: Sequence[_Run]) -> Order:
    """In which order linear maps run, seen on one sample of each task."""
    traces = []
    for run in runs:
        trace: list[str] = []
        for batch in run.batches(run.samples()[:1]):
            run.forward(batch, partial(_note, trace))
        traces.append(trace)
    return order_of(traces, given.vectors.plan.entries, given.vectors.places)


def _note(trace: list[str], use: Use) -> None:
    trace.append(use.name)
