"""Consensus merging by TALL masks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from .options import Number
from .registry import register
from .stage import Chunk, Method, Stage


@register("consensus", paper="Wang et al., Localizing task information (TALL masks), 2024, arXiv 2405.07813")
def consensus(
    threshold: Annotated[Number, Field(ge=0)] = 0.4, agreement: Annotated[int, Field(ge=1)] = 2
) -> Method:
    """Add the task vectors, but only where at least `agreement` experts need the sum.

    Expert k needs position i when |τ_k| > threshold · |v − τ_k| there, v being the sum of the stack.

    Args:
        threshold: the paper's λ, which it searches in 0.2 … 0.6.
        agreement: how many experts must need a position (the paper's k = 2).
    """

    def apply(chunk: Chunk, _: None) -> Tensor:
        total = chunk.weights @ chunk.stack
        needs = chunk.vectors.abs() > threshold * (total - chunk.vectors).abs_()
        return chunk.stack * (needs.sum(0) >= agreement)

    return Method("consensus", (Stage("keep what several experts need", apply),), scale=0.3)
