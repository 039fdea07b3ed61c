"""Accuracy of one model on one task, and how much of the experts' accuracy a merge keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import UsageError
from ..tasks.task import Task
from .inference import logits_of


@dataclass(frozen=True)
class Score:
    """How many of a task's evaluation samples a model got right.

    Attributes:
        correct: samples whose most likely class is their label.
        total: samples.
        predictions: the most likely class of each sample, in the order of the data.
    """

    correct: int
    total: int
    predictions: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """Share of the samples that are right."""
        return self.correct / self.total


def accuracy(
    module: nn.Module, task: Task, *, batch_size: int | None = None, device: torch.device | str | None = None
) -> Score:
    """Score a model on a task's evaluation data, each sample seen once.

    Args:
        module: as the task's skeleton makes them; in evaluation mode.
        task: with evaluation data.
        batch_size: samples a forward pass; by a budget of tokens or values when None.
        device: where the module is; told from its parameters when None.

    Raises:
        UsageError: the task has no labelled evaluation data.
    """
    if task.evaluate is None or task.evaluate.labels is None:
        raise UsageError(f"task '{task.name}' has no labelled data to score on; give evaluate=")
    labels = list(task.evaluate.labels)
    predictions = (
        logits_of(module, task, task.evaluate, batch_size=batch_size, device=device).argmax(-1).tolist()
    )
    correct = sum(found == wanted for found, wanted in zip(predictions, labels, strict=True))
    return Score(correct, len(labels), tuple(predictions))


def normalised_accuracy(merged: Mapping[str, Score], experts: Mapping[str, Score]) -> float:
    """Mean over the tasks of merged / expert accuracy; NaN where an expert has no sample right.

    Raises:
        UsageError: not the same tasks.
    """
    if set(merged) != set(experts) or not merged:
        raise UsageError(f"scores of different tasks: {', '.join(merged)} and {', '.join(experts)}")
    ratios = [
        merged[task].accuracy / expert.accuracy if expert.correct else float("nan")
        for task, expert in experts.items()
    ]
    return sum(ratios) / len(ratios)
