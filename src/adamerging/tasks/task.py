"""What a task is: a model that turns inputs into logits, and the data to adapt to and to score on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..weights.source import Weights

Inputs = Mapping[str, Tensor]
"""A batch as the model takes it: tensors by argument name, first dimension the samples."""


@dataclass(frozen=True)
class Samples:
    """One split of a data set.

    Attributes:
        inputs: the raw inputs (texts, arrays, images), one a sample.
        labels: class numbers, or None for unlabeled data.
        source: where they come from, for records and messages.
        fingerprint: sha256 over the content; two splits with equal fingerprints are the same data.
    """

    inputs: Sequence[Any]
    labels: Sequence[int] | None
    source: str
    fingerprint: str

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Task:
    """One task, independent of any weights.

    Attributes:
        name: the same as its expert's.
        skeleton: ``(expert, base) → module``: a fresh module in evaluation mode whose tensors carry the
            expert's names. Its body is filled with the merged weights and shared between tasks; tensors
            the plan calls a head keep the values the skeleton comes with. Never a module of the caller.
        forward: ``(module, inputs) → logits (B, C)``.
        collate: raw inputs of some samples → `Inputs` on the CPU, padded to the longest of them.
        adapt: unlabeled data for learning coefficients (labels, if present, are only used by the
            `supervised` objective); None when the task is only scored.
        evaluate: labelled data for scores; None when the task is only adapted to.
        costs: relative cost of each adaptation sample (token count), to batch like with like; None if equal.
        label_names: names of the classes, where known.
        settings: how the task was made (its kind and options), as plain data for the record of a run;
            complete once a skeleton was made.
        features: ``(module, inputs) → (B, F)``, what the body makes of inputs before any head; None where
            it is what goes into the head (see `adamerging.evaluation.features`).
        fixed_head: ``(expert, base) → (C, F)``, the linear head over `features` where it is one that no
            expert was trained to have, as in zero-shot classification; None where heads are trained.
    """

    name: str
    skeleton: Callable[[Weights, Weights], nn.Module]
    forward: Callable[[nn.Module, Inputs], Tensor]
    collate: Callable[[Sequence[Any]], Inputs]
    adapt: Samples | None = None
    evaluate: Samples | None = None
    costs: Callable[[Samples], Sequence[int]] | None = None
    label_names: Sequence[str] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    features: Callable[[nn.Module, Inputs], Tensor] | None = None
    fixed_head: Callable[[Weights, Weights], Tensor] | None = None

    @property
    def kind(self) -> str:
        """How it was made, see `adamerging.tasks.spec.Kind`; ``module`` where it runs code of the user's."""
        return str(self.settings.get("kind", "module"))

    @property
    def has_code(self) -> bool:
        """Whether it runs code of the user's, which has no fingerprint to keep results by."""
        return (self.settings["of"] if self.kind == "unseen" else self.kind) == "module"
