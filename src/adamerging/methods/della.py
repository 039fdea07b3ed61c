"""DELLA: drop by magnitude, at random."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..errors import UsageError
from .options import Fraction, Seed, numbers
from .randomness import below
from .registry import register
from .signs import disjoint, elect
from .stage import Chunk, Method, Stage


@register("della", paper="Deep et al., DELLA-Merging, 2024, arXiv 2406.11617")
def della(
    density: Fraction = 0.5,
    epsilon: Annotated[float, Field(ge=0, le=1)] = 0.1,
    seed: Seed = 0,
    rescale: bool = True,
    consensus: bool = True,
) -> Method:
    """Drop values at random, the small ones of each row more often; rescale, elect signs, average.

    Within a row the probability to stay rises linearly with the rank of the magnitude, from
    density − ε to density + ε, and what stays is divided by its own probability.

    Args:
        density: mean probability that a value stays.
        epsilon: half the spread of that probability; density ± ε must lie in (0, 1] unless the
            density is 1 and keeps everything.
        seed: as in `dare`.
        rescale: divide each value by its probability to stay.
        consensus: elect a sign for each position and average what agrees (the paper).
    """
    for mean in numbers(density):
        _check(mean, epsilon)
    stage = drop_by_rank(density, epsilon, seed, rescale)
    if consensus:
        return Method("della", (stage, elect("none")), disjoint("mean"), seed=seed)
    return Method("della", (stage,), scale=0.3, seed=seed)


def drop_by_rank(density: Fraction, epsilon: float, seed: int, rescale: bool) -> Stage:
    """Keep each value with a probability that rises with the rank of its magnitude in its row."""

    def apply(chunk: Chunk, _: None) -> Tensor:
        result = torch.empty_like(chunk.stack)
        for row, (task, mean) in enumerate(zip(chunk.tasks, chunk.settings(density), strict=True)):
            if mean >= 1:
                result[row] = chunk.stack[row]
                continue
            _check(mean, epsilon)
            lines = chunk.stack[row].view(-1, chunk.row_size)
            order = lines.abs().argsort(dim=1, stable=True)
            spread = epsilon if lines.shape[1] > 1 else 0.0
            steps = torch.linspace(mean - spread, mean + spread, lines.shape[1], dtype=lines.dtype)
            steps.mul_(65536).round_().clamp_min_(1).div_(65536)
            chance = torch.empty_like(lines).scatter_(1, order, steps.expand_as(lines)).view(-1)
            # Named apart from `dare`, whose draws would else be the same in a chain of both.
            stays = below(chance, seed, f"della/{task}", chunk.name, chunk.start, chunk.stop)
            torch.mul(chunk.stack[row], stays, out=result[row])
            if rescale:
                result[row].div_(chance)
        return result

    return Stage("drop at random by rank", apply, scope="row")


def _check(mean: float, epsilon: float) -> None:
    if mean < 1 and not (mean - epsilon > 0 and mean + epsilon <= 1):
        raise UsageError(f"della: density ± epsilon (={mean:g} ± {epsilon:g}) must lie in (0, 1]")
