"""WUDI-Merging: the vector that disturbs no task in the directions in which that task moved.

Of the tasks' matrices τ_t ``(m, n)`` the merge τ minimises Σ ‖(τ − τ_t) τ_tᵀ‖² / ‖τ_t‖². The rows of a task
vector stand for the inputs which that task's layer has seen, so this is RegMean with the Gram matrices
G_t = τ_tᵀ τ_t / ‖τ_t‖² in place of those of data, and has the normal equation τ Σ G_t = Σ τ_t G_t.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from .registry import register
from .spectral import changing_matrices, mean_shares, merging_matrices
from .stage import Chunk, Method


@register(
    "wudi",
    paper="Cheng et al., Whoever Started the Interference, 2025, arXiv 2503.08099",
    cost="of each matrix a product for each expert and a factorisation",
)
def wudi(
    matrices: Literal["blocks", "all"] = "blocks",
    others: Literal["base", "mean"] | None = None,
    solver: Literal["closed", "adam"] = "closed",
    ridge: Annotated[float, Field(ge=1e-9)] = 0.1,
    steps: Annotated[int, Field(ge=1)] = 300,
    lr: Annotated[float, Field(gt=0)] = 1e-5,
    as_vectors: list[str] | None = None,
) -> Method:
    """For every matrix, the one vector that agrees with each task vector along that vector's own rows.

    It starts from the sum of the task vectors and removes what one task adds to another's directions. The
    released code takes 300 steps of Adam with a rate of 1e-5 and so stops early. The closed form does in one
    solve what a step size does there: a ridge keeps it near the sum in directions where no task moved much.

    Args:
        matrices: those inside ``blocks``, all else staying at the base, as in the released code; or ``all``
            of them, all else being averaged, as in FusionBench.
        others: what becomes of all other tensors, if not as said there: ``base`` or ``mean``.
        solver: ``closed`` form, which also gives a vector for each task, or ``adam`` as released.
        ridge: of the closed form, in units of the mean eigenvalue of Σ G_t.
        steps: of Adam.
        lr: of Adam.
        as_vectors: patterns of matrices that are none; by default ``*text_projection*``.
    """
    leave = others == "base" or (others is None and matrices == "blocks")
    rest = torch.zeros_like if leave else mean_shares

    def outside(chunk: Chunk) -> bool:
        return matrices == "blocks" and chunk.place.index is None

    def change(chunk: Chunk, stack: Tensor) -> Tensor:
        return rest(stack) if outside(chunk) else _solve(stack, ridge)

    def combine(chunk: Chunk, stack: Tensor) -> Tensor:
        return rest(stack).sum(0) if outside(chunk) else _descend(stack, steps, lr)

    if solver == "closed":
        return changing_matrices("wudi", "remove interference", as_vectors, change, rest)
    return merging_matrices("wudi", "descend on interference", as_vectors, combine, rest)


def _solve(stack: Tensor, ridge: float) -> Tensor:
    """For each task τ_t (G_t + ρ I) (Σ G_t + ρ I)⁻¹ ``(K, m, n)``; their sum is the merge."""
    rows, columns = stack.shape[1:]
    moved = [index for index, matrix in enumerate(stack) if matrix.any()]
    total = torch.zeros(columns, columns, dtype=torch.float64)
    grams = {}  # kept where they are no larger than the matrices
    for index in moved:
        gram = _gram(stack[index].double().T)
        total += gram
        if columns <= rows:
            grams[index] = gram
    level = ridge * len(moved) / columns
    total.diagonal().add_(level)
    factor = torch.linalg.cholesky(total)
    changed = torch.zeros_like(stack)
    for index in moved:
        matrix = stack[index].double()
        if columns <= rows:
            grams[index].diagonal().add_(level)
            change = matrix @ torch.cholesky_solve(grams.pop(index), factor).T
        else:
            wanted = torch.addmm(matrix, _gram(matrix), matrix, beta=level)
            change = torch.cholesky_solve(wanted.T, factor).T
        changed[index] = change
    return changed


def _gram(matrix: Tensor) -> Tensor:
    """Inner products of the rows, ``(m, n) → (m, m)``, by the squared norm of all."""
    return (matrix @ matrix.T).div_(matrix.square().sum())


def _descend(stack: Tensor, steps: int, lr: float) -> Tensor:
    """Adam on the interference from the sum of the task vectors, ``(K, m, n) → (m, n)``.

    The gradient is 2 (τ Σ G_t − Σ τ_t G_t), so a step costs one product, however many tasks there are.
    """
    moved = [matrix for matrix in stack if matrix.any()]
    total = torch.zeros(stack.shape[2], stack.shape[2], dtype=stack.dtype)
    wanted = torch.zeros_like(stack[0])
    for matrix in moved:
        gram = _gram(matrix.T)
        total += gram
        wanted.addmm_(matrix, gram)
    merged = stack.sum(0)
    optimizer = torch.optim.Adam([merged], lr=lr, foreach=False)
    for _ in range(steps):
        merged.grad = torch.addmm(wanted, merged, total, beta=-1).mul_(2)
        optimizer.step()
    return merged
