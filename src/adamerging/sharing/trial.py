"""The fewest layers of an expert that are good enough, by labelled samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import UsageError
from ..evaluation.inference import Feed, logits_from
from ..evaluation.limit import first
from ..run import Prepared
from ..tasks.task import Samples, Task
from .blend import Blend
from .changes import Change, ranked

KEPT = 256 << 20
"""Bytes of ready inputs that are kept from one trial to the next."""


@dataclass(frozen=True)
class Found:
    """Layers that were chosen by accuracy.

    Attributes:
        layers: the ones that are kept.
        accuracy, expert: of the choice and of the whole expert, on the samples that chose.
        samples: how many these are.
        trials: how often the model was scored.
    """

    layers: frozenset[str]
    accuracy: float
    expert: float
    samples: int
    trials: int


class Trials:
    """Scores of one task under choices of its expert's layers; one model is held, and changed in place.

    Args:
        prepared: base, experts and plan.
        task: with labelled adaptation data, which judges.
        changes: what its expert changed.
        limit: samples that judge at most.
        device: where the model lives.

    Raises:
        UsageError: the task's adaptation data has no labels.
    """

    def __init__(
        self,
        prepared: Prepared,
        task: Task,
        changes: Sequence[Change],
        limit: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._task, self.count = task, 0
        self._blend = Blend(prepared, task, changes, device)
        self._samples = first(require_labels(task), limit)  # named labels are known now that the model is
        self._feed = Feed(task, self._samples, keep=KEPT)

    def accuracy(self, layers: Iterable[str]) -> float:
        """Share of the judging samples that are right with these layers the expert's, others the base's."""
        self._blend.keep(layers)
        self.count += 1
        assert self._samples.labels is not None
        labels = torch.tensor([int(label) for label in self._samples.labels])
        found = logits_from(self._blend.module, self._task, self._feed, self._blend.device).argmax(-1)
        return float((found == labels).double().mean())

    def smallest(self, scores: Mapping[str, float], sizes: Mapping[str, int], loss: float) -> Found:
        """The smallest choice found whose accuracy is within ``loss`` of the expert's.

        First the fewest layers of highest score, by halving; then each layer that is kept, the largest first,
        is left out if the accuracy stays.

        Args:
            scores: of the layers.
            sizes: their parameters.
            loss: a share; 0.005 is half a point.
        """
        order = ranked(scores)
        expert = self.accuracy(order)
        least = expert - loss - 1e-9
        low, high, kept, reached = 0, len(order), set(order), expert
        while low < high:  # assumes that more layers are no worse; the second pass mends what that misses
            middle = (low + high) // 2
            accuracy = self.accuracy(order[:middle])
            if accuracy >= least:
                high, kept, reached = middle, set(order[:middle]), accuracy
            else:
                low = middle + 1
        for name in sorted(kept, key=lambda name: (-sizes[name], name)):
            accuracy = self.accuracy(kept - {name})
            if accuracy >= least:
                kept, reached = kept - {name}, accuracy
        return Found(frozenset(kept), reached, expert, len(self._samples), self.count)


def require_labels(task: Task) -> Samples:
    """The labelled data that chooses layers: the adaptation data, never what is to be scored on.

    Raises:
        UsageError: there is none.
    """
    if task.adapt is None or task.adapt.labels is None:
        raise UsageError(
            f"task '{task.name}' has no labelled data to choose layers by; give labelled validation data "
            "under adapt (--data NAME=FILE), which is not what it will be scored on"
        )
    return task.adapt
