"""What one task adds to the base that all tasks share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class SharedTask:
    """One task over a shared base (TAPS, arXiv 2203.16708).

    Attributes:
        name: the task.
        delta: new values minus the base's of every gated layer that is open, float32, in the base's shape, by
            the base's tensor name. Layers that are not here are the base's.
        own: values, not differences, of tensors that every task keeps for itself: norms, biases, BatchNorm's
            affine values and statistics.
        head: the task's head, by the expert's tensor names.
        scores: the gate's score by layer; a layer is open where it reaches the threshold.
        config: folder with ``config.json`` and the tokenizer of the task's model; None for a plain module.
    """

    name: str
    delta: Mapping[str, Tensor]
    own: Mapping[str, Tensor]
    head: Mapping[str, Tensor]
    scores: Mapping[str, float]
    config: Path | None = None
