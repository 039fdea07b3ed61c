"""Accuracy: every sample once, in the data's order whatever the batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from adamerging.errors import UsageError
from adamerging.evaluation import logits_of, normalised_accuracy, score
from adamerging.evaluation.metrics import Metrics, metrics
from adamerging.tasks import Task, module_task

X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [0.0, 3.0], [5.0, 4.0]])
LABELS = [0, 1, 1, 1, 0]


class Counting(nn.Module):
    """Its inputs are its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[float]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += x.tolist()
        return x


def make_task() -> Task:
    return module_task("t", evaluate=list(zip(X, LABELS, strict=True)), model=Counting)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_each_sample_is_seen_once_and_counted(batch_size: int) -> None:
    module = Counting()
    found = score(module, make_task(), batch_size=batch_size)
    assert found == metrics(X, torch.tensor(LABELS))
    assert (found.correct, found.samples, found.accuracy) == (4, 5, 0.8)
    assert sorted(module.seen) == sorted(X.tolist())


def test_samples_of_like_cost_go_together_and_keep_their_places() -> None:
    module = Counting()
    task = replace(make_task(), costs=lambda samples: [int(x.sum()) for x in samples.inputs])
    assert task.evaluate is not None
    assert torch.equal(logits_of(module, task, task.evaluate, batch_size=2), X)
    assert [sum(x) for x in module.seen] == [1, 1, 3, 3, 9]


def with_accuracy(share: float) -> Metrics:
    return Metrics(10, share, 0.0, 0.0, 0.0, 0.0)


def test_normalised_accuracy_is_the_mean_of_ratios() -> None:
    merged = {"a": with_accuracy(0.4), "b": with_accuracy(0.9)}
    experts = {"a": with_accuracy(0.8), "b": with_accuracy(0.9)}
    assert normalised_accuracy(merged, experts) == pytest.approx(0.75)
    with pytest.raises(UsageError, match="different tasks"):
        normalised_accuracy({"a": merged["a"]}, experts)


def test_a_task_without_labels_is_not_scored() -> None:
    with pytest.raises(UsageError, match="no labelled data to score on"):
        score(Counting(), module_task("t", X, model=Counting))
