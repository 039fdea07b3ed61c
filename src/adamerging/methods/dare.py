"""DARE: drop and rescale."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .options import Fraction, Seed
from .randomness import below, resolved
from .registry import register
from .signs import disjoint, elect
from .stage import Chunk, Method, Stage


@register("dare", paper="Yu et al., Language models are Super Mario, 2024, arXiv 2311.03099")
def dare(density: Fraction = 0.5, seed: Seed = 0, rescale: bool = True, consensus: bool = False) -> Method:
    """Drop values of the task vectors at random, scale the others up by 1/density, then add.

    Args:
        density: probability that a value stays (the paper's 1 − p), resolved to 1/65536.
        seed: the same seed gives the same merge, whatever the chunk size or the order of the experts.
        rescale: divide what stays by the density, so that the expected task vector is unchanged.
        consensus: elect a sign for each position and add only what agrees (DARE with the TIES rule).
    """
    stages = (drop(density, seed, rescale),)
    if consensus:
        return Method("dare", (*stages, elect("none")), disjoint("sum"), scale=0.3, seed=seed)
    return Method("dare", stages, scale=0.3, seed=seed)


def drop(density: Fraction, seed: int, rescale: bool) -> Stage:
    """Keep each value with probability ``density``."""

    def apply(chunk: Chunk, _: None) -> Tensor:
        result = torch.empty_like(chunk.stack)
        for row, (task, keep) in enumerate(zip(chunk.tasks, chunk.settings(density), strict=True)):
            stays = below(keep, seed, task, chunk.name, chunk.start, chunk.stop)
            factor = 1 / resolved(keep) if rescale and resolved(keep) > 0 else 1.0
            # numpy multiplies by booleans three times as fast as torch
            with np.errstate(invalid="ignore"):  # infinity that was asked for times zero
                np.multiply(chunk.stack[row].numpy(), stays.numpy(), out=result[row].numpy())
            result[row].mul_(factor)
        return result

    return Stage("drop at random", apply)
