"""How much an expert changed each tensor of its base, and which of them a store may leave out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import UsageError
from ..run import Prepared

Scores = Mapping[str, Mapping[str, float]]
"""By task and by the base's tensor name."""
Choice = Mapping[str, frozenset[str]]
"""Layers that each task keeps of its own."""


@dataclass(frozen=True, slots=True)
class Change:
    """What one expert did to one tensor of the base.

    Attributes:
        name: the base's name.
        parameters: values of the tensor.
        relative: norm of the change by the norm of the base's tensor (the norm itself where that is zero).
        gated: a matrix, kernel or table that a store may leave out; what is not (norms, biases, statistics)
            is small, and is always kept.
    """

    name: str
    parameters: int
    relative: float
    gated: bool


def survey(prepared: Prepared) -> dict[str, list[Change]]:
    """Every tensor that each expert changed, by task, in the base's order. Reads all weights once.

    Raises:
        NonFiniteError: NaN or infinity in the weights.
    """
    vectors = prepared.vectors
    found: dict[str, list[Change]] = {task: [] for task in vectors.tasks}
    for entry in vectors.plan.with_treatment("merged", "averaged"):
        opened = vectors.open(entry)
        base, own = 0.0, torch.zeros(len(vectors.tasks), dtype=torch.float64)
        for start, stop in vectors.spans(entry, "element"):
            chunk = vectors.read(opened, start, stop)
            base += float(chunk.base.double().square().sum())
            own += chunk.vectors.double().square().sum(1)
        gated = len(entry.spec.shape) > 1 and entry.treatment == "merged"
        for task, square in zip(vectors.tasks, own.tolist(), strict=True):
            if square > 0:
                relative = math.sqrt(square / base) if base > 0 else math.sqrt(square)
                found[task].append(Change(entry.name, entry.spec.numel, relative, gated))
    vectors.scanned = True
    return found


def norms(changes: Mapping[str, Sequence[Change]]) -> dict[str, dict[str, float]]:
    """The relative norm of every gated layer that a task changed."""
    return {task: {c.name: c.relative for c in own if c.gated} for task, own in changes.items()}


def above(scores: Scores, threshold: float) -> dict[str, frozenset[str]]:
    """Layers whose score is at least the threshold."""
    return {t: frozenset(n for n, score in own.items() if score >= threshold) for t, own in scores.items()}


def largest(scores: Scores, share: float) -> dict[str, frozenset[str]]:
    """Of each task the given share of its layers, those of the highest score, rounded up."""
    return {task: frozenset(ranked(own)[: math.ceil(share * len(own))]) for task, own in scores.items()}


def within_budget(
    scores: Scores, changes: Mapping[str, Sequence[Change]], fixed: int, one: int, budget: float
) -> dict[str, frozenset[str]]:
    """The layers of highest score, of all tasks together, that a store of that size has room for.

    Args:
        scores: of the layers.
        changes: what the experts changed.
        fixed: parameters that are stored in any case: base, heads, norms and biases.
        one: parameters of the base.
        budget: size of the store in multiples of the base.

    Raises:
        UsageError: not even what is stored in any case fits.
    """
    if fixed > budget * one:
        raise UsageError(
            f"budget (={budget:g}) is too small: base, heads, norms and biases alone take {fixed / one:.3f} "
            "times the base's parameters"
        )
    sizes = {(task, change.name): change.parameters for task, own in changes.items() for change in own}
    room = budget * one - fixed
    kept: dict[str, set[str]] = {task: set() for task in scores}
    every = [(score, task, name) for task, own in scores.items() for name, score in own.items()]
    for _, task, name in sorted(every, key=lambda item: (-item[0], item[1], item[2])):
        if sizes[task, name] <= room:
            room -= sizes[task, name]
            kept[task].add(name)
    return {task: frozenset(names) for task, names in kept.items()}


def ranked(scores: Mapping[str, float]) -> list[str]:
    """Names from the highest score to the lowest; of equals, in the order of names."""
    return sorted(scores, key=lambda name: (-scores[name], name))
