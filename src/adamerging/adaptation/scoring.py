"""How good base, experts, simple average, start and merged model are, one after the other in one body."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..evaluation.metrics import Metrics
from ..evaluation.scores import normalised_accuracy
from ..evaluation.scores import score as score_one
from ..stream import Workers
from ..task_vectors import TaskVectors
from ..tasks.task import Task
from .body import Body
from .coefficients import layout
from .store import VectorStore

EXPERT = "expert"
Fill = Callable[[], None]
"""Makes the working body a model."""
FillOwn = Callable[[str], None]
"""Makes the working body the model of one task."""


@dataclass(frozen=True)
class Scores:
    """Accuracies on the tasks' labelled data.

    Attributes:
        by_model: by model (base, expert, average, start, merged) and task.
        data: fingerprint of each task's labelled data, by which a later evaluation knows that it is the same.
    """

    by_model: Mapping[str, Mapping[str, Metrics]]
    data: Mapping[str, str] = field(default_factory=dict)

    def records(self) -> list[dict[str, Any]]:
        """One record a model and task."""
        return [
            {
                "model": model,
                "task": task,
                "correct": score.correct,
                "total": score.samples,
                "accuracy": score.accuracy,
            }
            for model, scores in self.by_model.items()
            for task, score in scores.items()
        ]

    def mean(self) -> dict[str, float]:
        """Mean accuracy over the tasks by model."""
        return {
            model: sum(score.accuracy for score in scores.values()) / len(scores)
            for model, scores in self.by_model.items()
        }

    def normalised(self) -> dict[str, float | None]:
        """Mean of accuracy / expert's accuracy by model; None where an expert has nothing right."""
        found = {
            model: normalised_accuracy(scores, self.by_model[EXPERT])
            for model, scores in self.by_model.items()
        }
        return {model: value if value == value else None for model, value in found.items()}

    def as_dict(self) -> dict[str, Any]:
        """For ``run.json``."""
        return {
            "records": self.records(),
            "mean": self.mean(),
            "normalised": self.normalised(),
            "data": dict(self.data),
        }


def score(
    tasks: Sequence[tuple[Task, nn.Module]],
    body: Body,
    vectors: TaskVectors,
    models: Mapping[str, Fill],
    say: Callable[[str], None] = lambda _: None,
    own: Mapping[str, FillOwn] | None = None,
) -> Scores | None:
    """Score every model on every task that has labelled data; None where no task has.

    Args:
        tasks: with their modules, which share the body.
        body: the working body; it ends as the last of the models.
        vectors: base and experts.
        models: by name what fills the body, in order; each under every task's head.
        say: told what is scored.
        own: by name of a model that has weights for each task what makes the body these.
    """
    own = {EXPERT: lambda task: body.load_expert(vectors, task), **(own or {})}
    scored = [(task, module) for task, module in tasks if task.evaluate is not None]
    if not scored:
        for fill in list(models.values())[-1:]:
            fill()
        return None
    found: dict[str, dict[str, Metrics]] = {}
    order = list(models)
    for name in [*order[:1], EXPERT, *order[1:]]:
        say(f"scores: {name}")
        if name in models:
            models[name]()
        found[name] = {}
        for task, module in scored:
            if name in own:
                own[name](task.name)
            found[name][task.name] = score_one(module, task, device=body.device)
    data = {task.name: task.evaluate.fingerprint for task, _ in scored if task.evaluate is not None}
    return Scores(found, data)


def average_into(body: Body, vectors: TaskVectors, workers: Workers) -> None:
    """Make the body the plain average of the experts."""
    body.reset(vectors)
    store = VectorStore(vectors, workers, device=body.device)
    where = layout("task", vectors.tasks, store.entries(), vectors.places)
    share = where.full([1 / len(vectors.tasks)] * len(vectors.tasks))
    store.materialise(body.tensors, share, where)
