"""What explains a row's scores: how well entropy stands for loss, and which classes are taken for which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .bench import Bench, class_names_of
from .diagnosis import confusion, entropy_against_loss
from .settings import CompareSettings


def explains(settings: CompareSettings) -> bool:
    """Whether rows are explained."""
    return settings.why


def explain(bench: Bench, logits: Mapping[str, Tensor], experts: Mapping[str, Tensor]) -> dict[str, Any]:
    """The `why` of a row.

    Args:
        bench: with the tasks' labels.
        logits: ``(N, C)`` of the model on clean data, by task.
        experts: those of each task's expert, on the same data.
    """
    found: dict[str, Any] = {"entropy_loss": {}, "confusion": {}}
    for task, own in logits.items():
        labels = bench.labels(task)
        found["entropy_loss"][task] = entropy_against_loss(own, labels)
        if task in experts:
            names = class_names_of(bench.seats[task])
            found["confusion"][task] = confusion(own, labels, experts[task], names)
    return {name: values for name, values in found.items() if values}
