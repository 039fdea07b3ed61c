"""Does an expert look fine-tuned from this base? Told from a sample of its largest matrices.

Fine-tuning moves weights little: the cosine between an expert's matrix and the base's stays near 1.
Unrelated weights of the same shapes give a cosine near 0, and a merge of them is noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .task_vectors import TaskVectors

UNRELATED = 0.5
_TENSORS = 8
_SAMPLE = 1 << 15


@dataclass(frozen=True, slots=True)
class Relatedness:
    """How an expert lies to the base.

    Attributes:
        cosine: mean over the sampled matrices of cos(expert, base); 1 where nothing changed.
        related: whether it looks fine-tuned from this base.
    """

    cosine: float

    @property
    def related(self) -> bool:
        """Whether the cosine is at least 0.5."""
        return not self.cosine < UNRELATED


def relatedness(vectors: TaskVectors) -> Mapping[str, Relatedness]:
    """A quick look at every expert; reads at most a few hundred thousand values of each."""
    matrices = [entry for entry in vectors.entries() if len(entry.spec.shape) > 1]
    largest = sorted(matrices, key=lambda entry: -vectors.numel(entry))[:_TENSORS]
    cosines: dict[str, list[float]] = {task: [] for task in vectors.tasks}
    for entry in largest:
        total = vectors.numel(entry)
        start = max(0, (total - _SAMPLE) // 2)
        chunk = vectors.read(vectors.open(entry), start, min(total, start + _SAMPLE))
        experts = (chunk.base + chunk.vectors).double()
        found = torch.nn.functional.cosine_similarity(experts, chunk.base.double()[None], dim=1)
        for task, cosine in zip(vectors.tasks, found.tolist(), strict=True):
            cosines[task].append(cosine)
    return {
        task: Relatedness(sum(values) / len(values) if values else 1.0) for task, values in cosines.items()
    }
