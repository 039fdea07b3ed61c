"""Give each task vector back the norm that an earlier transform took from it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..errors import UsageError
from .registry import register
from .stage import Chunk, Method, Stage, Stream

_NEARLY_ZERO = 1e-7

Norm = Literal["l1", "l2"]


@register(
    "rescale",
    paper="after Yu et al., Language models are Super Mario, 2024, arXiv 2311.03099",
    cost="two passes",
)
def rescale(norm: Norm = "l1") -> Method:
    """Scale each tensor of each task vector to the norm it was read with; for chains that drop values.

    Args:
        norm: sum of magnitudes (``l1``), or Euclidean length (``l2``).
    """
    return Method("rescale", (restore(norm),), scale=0.3)


def restore(norm: Norm) -> Stage:
    """Multiply each row of the stack so that its norm over the tensor is that of its task vector as read."""
    power = 1 if norm == "l1" else 2

    def sizes(chunk: Chunk) -> Tensor:
        if chunk.tasks != chunk.experts:
            raise UsageError("rescale compares each expert with itself and cannot follow what merged them")
        return torch.stack([rows.double().abs().pow_(power).sum(1) for rows in (chunk.vectors, chunk.stack)])

    def survey(stream: Stream) -> Tensor:
        total = torch.zeros(2, len(stream.tasks), dtype=torch.float64)
        for part in stream.map(sizes):
            total += part
        before, after = total.pow_(1 / power)
        negligible = (before < _NEARLY_ZERO) | (after < _NEARLY_ZERO)
        return torch.where(negligible, 1.0, before / after.masked_fill(negligible, 1.0))

    def apply(chunk: Chunk, factors: Tensor) -> Tensor:
        return chunk.stack * factors.to(chunk.stack.dtype)[:, None]

    return Stage("restore the norm", apply, survey)
