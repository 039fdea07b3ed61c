"""Iso-C: isotropic merging in the common subspace."""

from __future__ import annotations

import torch
from torch import Tensor

from .decompositions import kept
from .registry import register
from .spectral import merging_matrices
from .stage import Chunk, Method


@register(
    "iso_c",
    paper="Marczak et al., No Task Left Behind, 2025, arXiv 2502.04959",
    cost="a decomposition of each matrix",
)
def iso_c(as_vectors: list[str] | None = None) -> Method:
    """Sum the task vectors and give every singular direction of the sum the same, mean, strength.

    Vectors and scalars are averaged, so the scale acts on a sum for matrices and on a mean for vectors, as
    in the paper. The default scale is 1; the paper searches it on labelled data (1.3 for 8 tasks).

    Args:
        as_vectors: patterns of matrices to average like vectors; by default ``*text_projection*``, as the
            authors do.
    """
    return merging_matrices("iso_c", "flatten the spectrum", as_vectors, _flatten)


def _flatten(_: Chunk, matrices: Tensor) -> Tensor:
    total = matrices.sum(0)
    return kept("flattened spectrum", total, {"flat": tuple(total.shape)}, _flattened)[0]


def _flattened(total: Tensor) -> tuple[Tensor]:
    left, values, right = torch.linalg.svd(total, full_matrices=False)
    return (values.mean() * (left @ right),)
