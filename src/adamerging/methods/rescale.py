"""Give each task vector back the norm that an earlier transform took from it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .registry import register
from .stage import Chunk, Method, Stage, Stream

_NEARLY_ZERO = 1e-7

Norm = Literal["l1", "l2"]


@register("rescale")
def rescale(norm: Norm = "l1") -> Method:
    """Scale each tensor of each task vector to the norm it was read with; for chains, after what drops values.

    Args:
        norm: sum of magnitudes (``l1``), or Euclidean length (``l2``).
    """
    return Method("rescale", (restore(norm),), scale=0.3)


def restore(norm: Norm) -> Stage:
    """Multiply each row of the stack so that its norm over the tensor is that of its task vector as read."""
    power = 1 if norm == "l1" else 2

    def sizes(chunk: Chunk) -> Tensor:
        rows = (chunk.vectors, chunk.stack) if len(chunk.stack) == len(chunk.vectors) else ()
        return torch.stack([row.double().abs().pow_(power).sum(1) for row in rows]) if rows else torch.ones(2, 1)

    def survey(stream: Stream) -> Tensor:
        parts = list(stream.map(sizes))
        if not parts:
            return torch.ones(1, dtype=torch.float64)
        before, after = torch.stack(parts).sum(0).pow_(1 / power)
        negligible = (before < _NEARLY_ZERO) | (after < _NEARLY_ZERO)
        return torch.where(negligible, 1.0, before / after.masked_fill(negligible, 1.0))

    def apply(chunk: Chunk, factors: Tensor) -> Tensor:
        return chunk.stack * factors.to(chunk.stack.dtype)[:, None]

    return Stage("restore the norm", apply, survey)
