"""Iso-CTS: isotropic merging in the common and in task-specific subspaces."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .components import Components, Triplets
from .registry import register
from .spectral import leading, merging_matrices, orthogonalise
from .stage import Chunk, Method


@register(
    "iso_cts",
    paper="Marczak et al., No Task Left Behind, 2025, arXiv 2502.04959",
    cost="of each matrix a decomposition for each expert and one for the sum",
)
def iso_cts(common: Annotated[float, Field(ge=0, le=1)] = 0.8, as_vectors: list[str] | None = None) -> Method:
    """Iso-C, with the weakest common directions replaced by the strongest that each task has of its own.

    The leading directions of the summed task vectors are common. What a task vector has outside the span of
    their left vectors is its own; each task gives an equal number of its leading directions. All of them
    together are replaced by the nearest orthonormal ones and get the same, mean, strength. Directions of
    zero strength stay zero. Vectors and scalars are averaged. The default scale is 1; the paper searches it
    on labelled data (1.5 for 8 tasks).

    Args:
        common: fraction of a matrix's rank that is common; the rest is divided evenly, so it is rounded to
            a multiple of the number of experts.
        as_vectors: patterns of matrices to average like vectors; by default ``*text_projection*``, as the
            authors do.
    """
    combine = partial(_common_and_own, fraction=common)
    method = merging_matrices("iso_cts", "flatten common and own directions", as_vectors, combine)

    def ranks(rows: int, columns: int, count: int) -> list[int]:
        own = own_rank(min(rows, columns), count, common)
        return [min(rows, columns) - own * count] + [own] * count

    split = partial(_directions, fraction=common)
    return replace(method, components=Components(split, ranks, shared=True))


def _common_and_own(_: Chunk, matrices: Tensor, fraction: float) -> Tensor:
    lefts, values, rights = zip(*_directions(matrices, fraction), strict=True)
    flat: Tensor = (torch.cat(lefts, 1) * torch.cat(values)) @ torch.cat(rights, 0)
    return flat


def _directions(matrices: Tensor, fraction: float) -> list[Triplets]:
    """The common triplets and those of each task, orthogonal to each other and equally strong."""
    rank, count = min(matrices.shape[1:]), len(matrices)
    share = own_rank(rank, count, fraction)
    shared = leading(matrices.sum(0), rank - share * count)
    span = shared[0]
    parts = [shared]
    if share:
        parts += [leading(matrix - span @ (span.T @ matrix), share) for matrix in matrices.double()]
    lefts, values, rights = zip(*parts, strict=True)
    left = orthogonalise(torch.cat(lefts, 1))
    right = orthogonalise(torch.cat(rights, 0).T)
    sizes = [len(own) for own in values] + [0] * (len(matrices) + 1 - len(values))
    flat = torch.cat(values).mean()
    return [
        (u, flat.repeat(u.shape[1]), v.T)
        for u, v in zip(torch.split(left, sizes, 1), torch.split(right, sizes, 1), strict=True)
    ]


def own_rank(rank: int, count: int, fraction: float) -> int:
    """How many of ``rank`` directions each of ``count`` tasks has of its own."""
    return min(round((rank - int(rank * fraction)) / count), rank // count)
