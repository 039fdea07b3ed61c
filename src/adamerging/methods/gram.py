"""Inner products between experts: the little that several geometric methods need of a tensor.

A mean on a sphere, or between two weights along the arc, is a linear combination of the experts whose
coefficients depend on their inner products alone. So these methods read a tensor twice, in chunks, and
compute with K × K numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from .stage import Chunk, Stage, Stream

Of = Literal["weights", "task_vectors"]


def gram(stream: Stream, of: Of) -> Tensor:
    """``(K, K)`` float64 inner products of the experts' weights or of their task vectors."""
    total = torch.zeros(len(stream.tasks), len(stream.tasks), dtype=torch.float64)
    for part in stream.map(lambda chunk: _inner(chunk, of)):
        total += part
    return total


def _inner(chunk: Chunk, of: Of) -> Tensor:
    rows = chunk.stack if of == "task_vectors" else chunk.base + chunk.stack
    rows = rows.double()
    return rows @ rows.T


def combine(name: str, of: Of, coefficients: Callable[[Tensor, Stream], Sequence[float]]) -> Stage:
    """A reducer: the combination of the experts whose coefficients follow from their inner products.

    Args:
        of: what is combined. Weights: the result is Σ c_k θ_k, given as its difference to the base.
        coefficients: ``(gram (K, K), stream of the tensor) → K`` numbers, computed once a tensor.
    """

    def survey(stream: Stream) -> Tensor:
        return torch.tensor(list(coefficients(gram(stream, of), stream)), dtype=torch.float64)

    def apply(chunk: Chunk, found: Tensor) -> Tensor:
        merged = found.to(chunk.stack.dtype) @ chunk.stack
        if of == "weights":
            merged += (float(found.sum()) - 1.0) * chunk.base
        return merged.unsqueeze(0)

    return Stage(name, apply, survey, keeps_tasks=False)
