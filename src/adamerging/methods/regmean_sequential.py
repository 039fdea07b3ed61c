"""RegMean++: RegMean whose inputs come from the merged earlier blocks, as they will in the merged model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .registry import register
from .regmean import regression
from .stage import Method, Statistics


@register(
    "regmean++",
    paper="Nguyen et al., RegMean++, 2025, arXiv 2508.03121",
    needs="unlabeled data of every task",
    cost="with B blocks about B/2 times the forward passes of regmean",
)
def regmean_sequential(
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.95,
    samples: Annotated[int, Field(ge=1)] = 256,
    floor: Annotated[float, Field(ge=1e-12)] = 1e-6,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> Method:
    """RegMean block after block, on inputs that come out of the blocks merged before.

    The inputs of a block in the merged model are not those which its expert has seen. So the experts run
    through the merged earlier blocks and their own block, then that block is merged. It costs about half as
    many forward passes more as there are blocks.

    Args:
        alpha: factor of the off-diagonal values of each G_t; 1 is least squares, 0 weighs each input alone.
        samples: of each task, at most.
        floor: added to the diagonal of each G_t, in units of the mean of all; directions that no input has
            are averaged.
        seed: of the choice of samples.
    """
    return regression("regmean++", alpha, floor, Statistics("gram", samples, seed, sequential=True))
