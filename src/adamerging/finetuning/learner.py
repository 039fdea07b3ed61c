"""A model in training: what the one loop needs to know of it, whatever its kind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from ..errors import UsageError
from ..tasks.labels import NamedLabels
from ..tasks.task import Samples, Task


class Aim(Protocol):
    """What a training is after beside the right answers, such as few layers of its own.

    Attributes:
        rates: peak learning rates of parameters that have their own, by name. They neither decay nor count
            when gradients are clipped.
    """

    rates: Mapping[str, float]

    def loss(self, progress: float) -> Tensor:
        """What is added to the cross-entropy, a scalar, after the share ``progress`` of the steps."""

    def cost(self) -> float:
        """What is taken off the validation accuracy when the epoch is chosen."""

    def figures(self) -> dict[str, float]:
        """What the history says of it at an evaluation."""


@dataclass
class Learner:
    """One model in training on one task.

    Attributes:
        task: how samples become batches and batches become logits; its name.
        module: the model, with gradients where it learns.
        head: names of the parameters that are new, not the base's.
        train: labelled samples to learn from.
        val: labelled samples that choose the epoch.
        label_names: names of the classes by number.
        save: writes the model and what belongs to it into a folder that exists.
        settings: what decided the model beside the settings of the training, for the record.
        aim: what else it is trained for, if anything.
    """

    task: Task
    module: nn.Module
    head: frozenset[str]
    train: Samples
    val: Samples
    label_names: Sequence[str]
    save: Callable[[nn.Module, Path], None]
    settings: dict[str, Any] = field(default_factory=dict)
    aim: Aim | None = None

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters that learn, by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}


def checked(name: str, which: str, samples: Samples, classes: Sequence[str]) -> Samples:
    """Labelled samples whose labels are class numbers.

    Raises:
        UsageError: no labels, or labels that are none of the classes.
    """
    where = f"task '{name}', {which} ({samples.source})"
    if samples.labels is None:
        raise UsageError(f"{where}: there are no labels; name their column with label_field")
    if isinstance(samples.labels, NamedLabels):
        samples.labels.settle(classes)
        return replace(samples, labels=samples.labels.check())
    low, high = min(samples.labels), max(samples.labels)
    if low < 0 or high >= len(classes):
        raise UsageError(
            f"{where}: labels from {low} to {high} do not fit the {len(classes)} classes "
            f"({', '.join(list(classes)[:5])}{', ...' if len(classes) > 5 else ''}), which count from 0"
        )
    return samples


def classes_of(samples: Samples) -> list[str]:
    """Names of the classes where nothing but the labels tells: the names that occur, or the numbers."""
    if samples.labels is None:
        return []
    if isinstance(samples.labels, NamedLabels):
        return sorted(set(samples.labels.names))
    return [str(number) for number in range(max(samples.labels) + 1)]


def copies(module: nn.Module) -> Callable[[Any, Any], nn.Module]:
    """The skeleton of a task whose model is in training: a copy of it as it stands."""
    return lambda expert, base: copy.deepcopy(module).eval().requires_grad_(False)
