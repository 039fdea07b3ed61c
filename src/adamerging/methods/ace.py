"""ACE-Merging: covariances of the inputs, estimated from the task vectors, weigh the experts."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .registry import register
from .spectral import merging_matrices
from .stage import Chunk, Method

_HETEROGENEOUS = 0.3
"""Above this spread of the task vectors' norms, covariances are normalised and the result is refined."""


@register(
    "ace",
    paper="Xu et al., ACE-Merging, 2026, arXiv 2603.02945",
    cost="of each matrix a product for each expert and a factorisation",
)
def ace(
    epsilon: Annotated[float, Field(gt=0)] = 1e-5,
    refine: Annotated[float, Field(gt=0, le=1)] = 0.3,
    centred: bool = False,
    as_vectors: list[str] | None = None,
) -> Method:
    """Weigh each task vector by the covariance of its rows, which stands for that of its layer's inputs.

    (Σ τ_t Σ_t) (Σ Σ_t + C)⁻¹, where Σ_t is the covariance of the rows of τ_t plus ε, and C repeats the mean
    row of Σ Σ_t. Where the norms of the task vectors differ much, covariances are divided by their traces
    and the leading directions of what is left over are added with equal strength. An expert that left a
    matrix as it is has no say in it. Vectors and scalars are averaged. ε is a number on the scale of squared
    task vectors, not a ratio.

    Args:
        epsilon: ε; the paper uses 1e-5 for vision transformers, 2e-4 for RoBERTa and 4e-2 for GPT-2, its
            code 1e-2.
        refine: fraction of the directions that a refinement keeps.
        centred: weigh the centred task vectors, as the released code does; the paper weighs them whole.
        as_vectors: patterns of matrices to average like vectors; by default ``*text_projection*``, as the
            authors do.
    """
    combine = partial(_weigh, epsilon=epsilon, refine=refine, centred=centred)
    return merging_matrices("ace", "weigh by covariance", as_vectors, combine)


def _weigh(_: Chunk, matrices: Tensor, epsilon: float, refine: float, centred: bool) -> Tensor:
    moved = [index for index, matrix in enumerate(matrices) if matrix.any()]
    if not moved:
        return matrices[0].double()
    stack = matrices[moved].double()  # an expert that left the matrix alone knows nothing of its inputs
    norms = stack.square().sum((1, 2))
    logs = (norms + 1e-12).log()
    normalise = len(stack) > 1 and bool(logs.var() / (logs.mean().square() + 1e-12) > _HETEROGENEOUS)
    whole, stack = stack, stack - stack.mean(1, keepdim=True)
    covariances = torch.empty(len(stack), stack.shape[2], stack.shape[2], dtype=torch.float64)
    floors = torch.full((len(stack),), epsilon, dtype=torch.float64)
    for covariance, matrix in zip(covariances, stack, strict=True):
        torch.mm(matrix.T, matrix, out=covariance)
    if normalise:
        traces = covariances.diagonal(dim1=1, dim2=2).sum(1) + 1e-12
        covariances /= traces[:, None, None]
        floors /= traces
    weighed = stack if centred else whole
    numerator = torch.zeros_like(whole[0])
    for matrix, covariance, floor in zip(weighed, covariances, floors, strict=True):
        numerator.addmm_(matrix, covariance).add_(matrix, alpha=float(floor))
    total = covariances.sum(0)
    prior = total.mean(0, keepdim=True)
    if normalise:
        prior = prior / (norms.mean() + 1e-12)
    total.diagonal().add_(floors.sum())
    merged: Tensor = torch.linalg.solve(total + prior, numerator, left=False)
    if normalise:
        residual = merged - whole.sum(0) @ (total / len(whole))
        for matrix, covariance in zip(whole, covariances, strict=True):
            residual.addmm_(matrix, covariance)
        left, values, right = torch.linalg.svd(residual, full_matrices=False)
        rank = max(1, int(refine * len(values)))
        merged = merged + values[:rank].mean() * (left[:, :rank] @ right[:rank])
    return merged
