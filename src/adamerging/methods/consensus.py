"""Consensus merging by TALL masks."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .options import NotNegative
from .registry import register
from .stage import Chunk, Method, Stage


@register("consensus", paper="Wang et al., Localizing task information (TALL masks), 2024, arXiv 2405.07813")
def consensus(threshold: NotNegative = 0.4, agreement: Annotated[int, Field(ge=1)] = 2) -> Method:
    """Add the task vectors, but only where at least `agreement` experts need the sum.

    Expert k needs position i when |τ_k| > threshold · |v − τ_k| there, v being the sum of the stack.

    Args:
        threshold: the paper's λ, which it searches in 0.2 … 0.6; a number, or one by expert, by name or
            over depth.
        agreement: how many experts must need a position (the paper's k = 2).
    """

    def apply(chunk: Chunk, _: None) -> Tensor:
        total = chunk.weights @ chunk.stack
        votes = torch.zeros_like(total)
        for vector, limit in zip(chunk.vectors, chunk.expert_settings(threshold), strict=True):
            votes.add_(excess(vector, total, limit).sign_().clamp_min_(0))
        return chunk.stack * votes.sub_(agreement - 0.5).sign_().clamp_min_(0)

    stage = Stage("keep what several experts need", apply)
    return Method("consensus", (stage,), scale=0.3, experts=(agreement, None))


def excess(vector: Tensor, total: Tensor, limit: float) -> Tensor:
    """|τ| - limit · |v - τ|, ``(n,)``: positive where an expert needs the merged vector v (a TALL mask)."""
    return vector.abs().sub_((total - vector).abs_().mul_(limit))
