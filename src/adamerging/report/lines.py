"""The models of a report, in the order it shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..evaluation.records import CLEAN, EXPERTS, Row
from .aggregate import (
    Spread,
    experts_row,
    mean_accuracy,
    normalised,
    normalised_interval,
    scores_of,
    seed_groups,
    spread,
)
from .load import Run

MARKS = {
    "val": "Settings chosen on labels of the validation data.",
    "oracle": "Settings chosen on the test labels themselves: a bound, not a result.",
    "labelled": "Coefficients learned from labels.",
    "transductive": "Adapted to inputs that it is scored on.",
}

NO_SINGLE = "no single model"
"""How a row's warning begins where each task has something of its own."""


@dataclass(frozen=True)
class Line:
    """One model over its seeds.

    Attributes:
        label: as in the records; `EXPERTS` for each expert on its own task.
        kind: of its rows.
        rows: those with scores, one a seed.
        marks: keys of `MARKS` that a reader must know.
        rank: place among the merged models by what they keep, from 0; None for the references.
    """

    label: str
    kind: str
    rows: tuple[Row, ...]
    marks: tuple[str, ...] = ()
    rank: int | None = None

    @property
    def merged(self) -> bool:
        """Whether it is a model made from the experts rather than a reference."""
        return self.kind not in ("base", "expert", "plain")

    @property
    def counts(self) -> bool:
        """Whether it may be called best: a merged model that saw no labels of the test data, nor any."""
        return self.merged and not {"oracle", "labelled"} & set(self.marks)

    @property
    def single(self) -> bool:
        """Whether all tasks share one model."""
        return not any(text.startswith(NO_SINGLE) for row in self.rows for text in row.warnings)

    def accuracy(self, task: str, condition: str = CLEAN, *, unseen: bool = False) -> Spread | None:
        """On one task over seeds."""
        return spread(
            score.accuracy
            for row in self.rows
            for score in scores_of(row, condition, unseen=unseen)
            if score.task == task
        )

    def ratio(self, task: str) -> float | None:
        """Accuracy / the expert's on one task, mean over seeds."""
        found = spread(s.normalised for row in self.rows for s in scores_of(row) if s.task == task)
        return found.mean if found else None

    def mean(self, tasks: Sequence[str] | None = None, *, unseen: bool = False) -> Spread | None:
        """Mean accuracy over the tasks, over seeds."""
        return spread(mean_accuracy(row, tasks=tasks, unseen=unseen) for row in self.rows)

    def interval(self) -> tuple[float, float] | None:
        """95 % interval of what is kept, from the size of the test data; its ends are means over seeds."""
        ends = [normalised_interval(row) for row in self.rows]
        known = [end for end in ends if end is not None]
        if not known or len(known) < len(ends):
            return None
        return sum(low for low, _ in known) / len(known), sum(high for _, high in known) / len(known)

    def kept(self, tasks: Sequence[str] | None = None) -> Spread | None:
        """Normalised accuracy over seeds."""
        return spread(normalised(row, tasks=tasks) for row in self.rows)


def lines_of(run: Run) -> list[Line]:
    """Base, experts, models made elsewhere, average, then the merged ones, best first; no rows of subsets."""
    rows = [row for row in run.rows if row.group is None and row.scores]
    experts = experts_row(rows)
    tasks = seen_tasks(run)
    groups = [
        Line(label, group[0].kind, tuple(group), _marks(group))
        for label, group in seed_groups(row for row in rows if row.kind != "expert").items()
    ]
    first = [line for line in groups if line.kind == "base"]
    first += [Line(EXPERTS, "expert", (experts,))] if experts is not None else []
    first += [line for line in groups if line.kind == "plain"]
    rest = sorted((line for line in groups if line.merged), key=lambda line: -_quality(line, tasks))
    ranked = [
        Line(line.label, line.kind, line.rows, line.marks, rank)
        for rank, line in enumerate(line for line in rest if line.kind != "average")
    ]
    return [*first, *(line for line in rest if line.kind == "average"), *ranked]


def seen_tasks(run: Run) -> list[str]:
    """Tasks with a score as a task that was merged, in the run's order."""
    scored = {s.task for row in run.rows if row.group is None for s in row.scores if not s.unseen}
    known = [task.name for task in run.comparison.tasks if task.name in scored]
    return [*known, *sorted(scored - set(known))]


def unseen_tasks(run: Run) -> list[str]:
    """Tasks with a score as a task that no expert saw, in the run's order; not those of subsets."""
    scored = {s.task for row in run.rows if row.group is None for s in row.scores if s.unseen}
    known = [task.name for task in run.comparison.tasks if task.name in scored]
    return [*known, *sorted(scored - set(known))]


def best(lines: Sequence[Line], tasks: Sequence[str]) -> Line | None:
    """The merged model that keeps most of the experts, oracles and labelled ones apart."""
    able = [line for line in lines if line.counts and line.mean(tasks) is not None]
    return max(able, key=lambda line: _quality(line, tasks), default=None)


def _quality(line: Line, tasks: Sequence[str]) -> float:
    found = line.kept(tasks) or line.mean(tasks)
    return found.mean if found is not None else -1.0


def _marks(rows: Sequence[Row]) -> tuple[str, ...]:
    found = {
        "val": any(row.chosen_on == "val" for row in rows),
        "oracle": any(row.chosen_on == "test" for row in rows),
        "labelled": any(row.labelled for row in rows),
        "transductive": any(row.transductive for row in rows),
    }
    return tuple(mark for mark, there in found.items() if there)
