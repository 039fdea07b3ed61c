"""Scores of one model on one task, and how much of the experts' accuracy a merge keeps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..tasks.task import Samples, Task
from .inference import logits_of
from .intervals import accuracy_interval
from .metrics import Metrics, metrics
from .records import CLEAN, ScoreRecord


def score(
    module: nn.Module, task: Task, *, batch_size: int | None = None, device: torch.device | str | None = None
) -> Metrics:
    """Score a model on a task's evaluation data, each sample seen once.

    Args:
        module: as the task's skeleton makes them; in evaluation mode.
        task: with evaluation data.
        batch_size: samples a forward pass; by a budget of tokens or values when None.
        device: where the module is; told from its parameters when None.

    Raises:
        UsageError: the task has no labelled evaluation data, or labels outside the model's classes.
        NonFiniteError: NaN or infinity among the logits.
    """
    samples = labelled(task.name, task.evaluate)
    return measure(logits_of(module, task, samples, batch_size=batch_size, device=device), samples)


def labelled(name: str, samples: Samples | None) -> Samples:
    """A task's evaluation data, which must have labels.

    Raises:
        UsageError: there is none, or it has none.
    """
    if samples is None or samples.labels is None:
        raise UsageError(f"task '{name}' has no labelled data to score on; give evaluate")
    return samples


def measure(logits: Tensor, samples: Samples) -> Metrics:
    """Score logits ``(N, C)`` by the labels of their samples. Raises as `metrics.metrics`."""
    assert samples.labels is not None
    return metrics(logits, torch.tensor([int(label) for label in samples.labels]))


def score_record(
    task: str, found: Metrics, bootstrap: int, condition: str = CLEAN, *, unseen: bool = False
) -> ScoreRecord:
    """What is kept of a score, not normalised.

    Args:
        task: its name.
        found: the numbers.
        bootstrap: resamples behind the interval.
        condition: what the samples are.
        unseen: no expert behind the model saw the task.
    """
    low, high = accuracy_interval(found.correct, found.samples, bootstrap)
    return ScoreRecord(
        task=task, condition=condition, unseen=unseen, samples=found.samples, accuracy=found.accuracy,
        accuracy_low=low, accuracy_high=high, macro_f1=found.macro_f1, ece=found.ece, nll=found.nll,
        entropy=found.entropy,
    )  # fmt: skip


def normalised_accuracy(merged: Mapping[str, Metrics], experts: Mapping[str, Metrics]) -> float:
    """Mean over the tasks of merged / expert accuracy; NaN where an expert has no sample right.

    Raises:
        UsageError: not the same tasks.
    """
    if set(merged) != set(experts) or not merged:
        raise UsageError(f"scores of different tasks: {', '.join(merged)} and {', '.join(experts)}")
    ratios = [
        merged[task].accuracy / expert.accuracy if expert.accuracy else float("nan")
        for task, expert in experts.items()
    ]
    return sum(ratios) / len(ratios)
