"""TIES-Merging: trim, elect signs, merge what agrees."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .options import Fraction
from .registry import register
from .selection import Top, find_top, keep, part_of
from .signs import Reduction, ZeroSign, default_scale, disjoint, elect
from .stage import Chunk, Method, Stage, Stream


@register(
    "ties",
    paper="Yadav et al., TIES-Merging, 2023, arXiv 2306.01708",
    cost="two passes",
)
def ties(
    density: Fraction = 0.2,
    scope: Literal["model", "tensor"] = "model",
    reduction: Reduction = "mean",
    zero_sign: ZeroSign = "none",
) -> Method:
    """Trim each task vector to its largest values, elect a sign for each position, merge what agrees.

    Args:
        density: fraction of each task vector that is kept.
        scope: trim over the whole task vector (the paper; values equal to the threshold all stay), or
            over each tensor by itself, exactly ``int(density · n)`` values.
        reduction: mean, sum or largest of the agreeing values. The usual scale is 1 for the mean and the
            largest, 0.3 for the sum, and these are the defaults.
        zero_sign: the sign elected where trimmed values cancel exactly; see `signs.elect`.
    """
    stages = (elect(zero_sign),) if density == 1 else (trim(density, scope), elect(zero_sign))
    return Method("ties", stages, disjoint(reduction), scale=default_scale(reduction))


def trim(density: Fraction, scope: Literal["model", "tensor"]) -> Stage:
    """Keep the largest ``density`` of each task vector, of the whole model or of each tensor."""

    def survey(stream: Stream) -> list[Top]:
        counts = [part_of(stream.numel(), fraction) for fraction in stream.settings(density)]
        return find_top(stream, counts, exact=scope == "tensor")

    def apply(chunk: Chunk, tops: list[Top]) -> Tensor:
        kept = torch.empty_like(chunk.stack)
        for row, top, out in zip(chunk.stack, tops, kept, strict=True):
            keep(row, top, chunk.start, out)
        return kept

    return Stage("trim", apply, survey, per=scope, reads=1 if scope == "model" else 2)
