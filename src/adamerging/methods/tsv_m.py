"""TSV-Merge: the leading singular directions of every task, made orthogonal to each other."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .components import Components, Triplets
from .registry import register
from .spectral import changing_matrices, leading, orthogonalise
from .stage import Chunk, Method


@register(
    "tsv_m",
    paper="Gargiulo et al., Task Singular Vectors, 2025, arXiv 2412.00081",
    cost="of each matrix a decomposition for each expert",
)
def tsv_m(as_vectors: list[str] | None = None) -> Method:
    """Give each task an equal share of every matrix's rank, decorrelate the shares, and add them.

    Of each task vector's matrix the leading rank/K singular triplets are kept and put side by side; left
    and right vectors are replaced by the nearest orthonormal ones (whitening). Vectors and scalars are
    averaged. The default scale is 1; the paper searches it on labelled data.

    Args:
        as_vectors: patterns of matrices to average like vectors; by default ``*text_projection*``, as the
            authors do.
    """
    method = changing_matrices("tsv_m", "decorrelate singular vectors", as_vectors, _decorrelate)
    return replace(method, components=Components(_shares, lambda m, n, count: [_rank(m, n, count)] * count))


def _rank(rows: int, columns: int, count: int) -> int:
    return max(1, min(rows, columns) // count)


def _shares(matrices: Tensor) -> list[Triplets]:
    """Of each task the leading triplets, made orthogonal to those of the other tasks."""
    count, rows, columns = matrices.shape
    rank = _rank(rows, columns, count)
    lefts, values, rights = zip(*(leading(matrix, rank) for matrix in matrices), strict=True)
    left = torch.split(orthogonalise(torch.cat(lefts, 1)), rank, 1)
    right = torch.split(orthogonalise(torch.cat(rights, 0).T), rank, 1)
    return [(u, s, v.T) for u, s, v in zip(left, values, right, strict=True)]


def _decorrelate(_: Chunk, matrices: Tensor) -> Tensor:
    changed = torch.empty_like(matrices)
    for share, (u, s, v) in zip(changed, _shares(matrices), strict=True):
        share.copy_((u * s) @ v)
    return changed
