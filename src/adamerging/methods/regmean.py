"""RegMean: of every linear map the one whose outputs are nearest to the experts' on their own inputs.

Let expert t's map W_t see n_t inputs on its task, the rows of X_t, and let G_t = X_tᵀ X_t / n_t. Then
Σ ‖X_t Wᵀ − X_t W_tᵀ‖² / n_t has its minimum at Wᵀ = (Σ G_t)⁻¹ Σ G_t W_tᵀ. It is the same for task vectors.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..errors import UsageError
from .means import mean_rows
from .registry import register
from .stage import Chunk, Method, Stage, Statistics


@register(
    "regmean",
    paper="Jin et al., Dataless Knowledge Fusion by Merging Weights, 2023, arXiv 2212.09849",
    needs="unlabeled data of every task",
    cost="a forward pass over the inputs, and a Gram matrix for each expert and map",
)
def regmean(
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.95,
    samples: Annotated[int, Field(ge=1)] = 256,
    floor: Annotated[float, Field(ge=1e-12)] = 1e-6,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> Method:
    """Every linear map as near to each expert's as it can be on that expert's unlabeled inputs.

    Wᵀ = (Σ G_t)⁻¹ Σ G_t W_tᵀ in closed form, where G_t is the mean outer product of the inputs which the map
    of expert t sees. That is done for all linear maps and convolutions of a model, those inside fused
    attention too. Embeddings, biases and norms are averaged.

    Args:
        alpha: factor of the off-diagonal values of each G_t; 1 is least squares, 0 weighs each input alone.
        samples: of each task, at most.
        floor: added to the diagonal of each G_t, in units of the mean of all; directions that no input has
            are averaged.
        seed: of the choice of samples.
    """
    return regression("regmean", alpha, floor, Statistics("gram", samples, seed))


def regression(name: str, alpha: float, floor: float, statistics: Statistics) -> Method:
    """The method whose stage solves for every tensor with Gram matrices, and averages all others."""

    def apply(chunk: Chunk, _: None) -> Tensor:
        grams = [gram for gram in chunk.statistics if gram is not None]
        if not grams:
            return mean_rows(chunk)
        if not chunk.stack.any():
            return torch.zeros_like(chunk.stack)
        return solve(chunk, alpha, floor)

    stage = Stage("regress on inputs", apply, scope="tensor")
    return Method(name, (stage,), seed=statistics.seed, statistics=statistics)


def solve(chunk: Chunk, alpha: float, floor: float) -> Tensor:
    """For each expert τ_t G_t (Σ w G)⁻¹ ``(K, n)`` in float64; weighted by w their sum is the merge.

    An expert without a Gram matrix has a task on which the map was never used, so that only the floor speaks
    for it.
    """
    known = [gram for gram in chunk.statistics if gram is not None]
    turned = known[0].ndim == 2
    parts = max(1 if gram.ndim == 2 else len(gram) for gram in known)
    width = known[0].shape[-1]
    diagonals = torch.stack([gram.diagonal(dim1=-2, dim2=-1).double().expand(parts, width) for gram in known])
    level = floor * float(diagonals.mean()) or floor

    def shrunk(gram: Tensor | None) -> Tensor:
        if gram is None:
            return level * torch.eye(width, dtype=torch.float64).expand(parts, width, width)
        own = gram.to(torch.float64, copy=True).reshape(-1, width, width)
        diagonal = own.diagonal(dim1=-2, dim2=-1)
        kept = diagonal + level
        own.mul_(alpha)
        diagonal.copy_(kept)
        return own.expand(parts, width, width)

    total = torch.zeros(parts, width, width, dtype=torch.float64)
    for weight, gram in zip(chunk.weights.tolist(), chunk.statistics, strict=True):
        total.add_(shrunk(gram), alpha=weight)
    factor, failed = torch.linalg.cholesky_ex(total)
    if failed.any():
        raise UsageError(f"the weights of '{chunk.name}' leave no least squares to solve; give positive ones")
    result = torch.empty_like(chunk.stack)
    for row, (vector, gram) in enumerate(zip(chunk.stack, chunk.statistics, strict=True)):
        matrix = vector.double().reshape(chunk.shape[0], -1)
        inputs = (matrix if turned else matrix.T).reshape(width, parts, -1).movedim(1, 0)
        solved = torch.cholesky_solve(shrunk(gram) @ inputs, factor)
        found = solved.movedim(0, 1).reshape(width, -1)
        result[row] = (found if turned else found.T).reshape(-1)
    return result
