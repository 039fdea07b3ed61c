"""What the spectral methods share: task vectors as matrices, leading singular triplets, polar factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .decompositions import kept
from .stage import Chunk, Method, Stage

TEXT_PROJECTION = ("*text_projection*",)
"""What the authors of TSV-M and Iso-C average like vectors though it is a matrix."""


Combine = Callable[[Chunk, Tensor], Tensor]
Shares = Callable[[Tensor], Tensor]


def mean_shares(stack: Tensor) -> Tensor:
    """Each row's share of the mean, ``(K, ...) → (K, ...)``."""
    return stack / len(stack)


def merging_matrices(
    name: str, step: str, as_vectors: Sequence[str] | None, combine: Combine, others: Shares = mean_shares
) -> Method:
    """A method that turns the matrices of all experts into one, and averages everything else.

    Args:
        name: of the method.
        step: name of its stage.
        as_vectors: see `as_matrices`; `TEXT_PROJECTION` when None.
        combine: ``(chunk, matrices (K, m, n)) → (m, n)``; some matrix is not zero.
        others: ``(K, n) → (K, n)`` for all that is no matrix, which is then summed.
    """

    def rest(stack: Tensor) -> Tensor:
        return others(stack).sum(0, keepdim=True)

    stage = _on_matrices(step, as_vectors, combine, rest, keeps_tasks=False)
    return Method(name, reduce=stage, weighted=False)


def changing_matrices(
    name: str, step: str, as_vectors: Sequence[str] | None, change: Combine, others: Shares = mean_shares
) -> Method:
    """A method that changes the matrix of each expert, so that their sum is the merge.

    The rows of the result still belong to the experts, and coefficients can be learned for them.

    Args:
        name: of the method.
        step: name of its stage.
        as_vectors: see `as_matrices`; `TEXT_PROJECTION` when None.
        change: ``(chunk, matrices (K, m, n)) → (K, m, n)``; some matrix is not zero.
        others: ``(K, n) → (K, n)`` for all that is no matrix.
    """
    return Method(name, (_on_matrices(step, as_vectors, change, others, keeps_tasks=True),))


def _on_matrices(
    step: str, as_vectors: Sequence[str] | None, function: Combine, others: Shares, *, keeps_tasks: bool
) -> Stage:
    patterns = TEXT_PROJECTION if as_vectors is None else tuple(as_vectors)

    def apply(chunk: Chunk, _: None) -> Tensor:
        matrices = as_matrices(chunk, patterns)
        if matrices is None:
            return others(chunk.stack)
        rows = len(matrices) if keeps_tasks else 1
        if not chunk.stack.any():
            return torch.zeros_like(chunk.stack[:rows])
        return function(chunk, matrices).to(chunk.stack.dtype).reshape(rows, -1)

    return Stage(step, apply, scope="tensor", keeps_tasks=keeps_tasks)


def as_matrices(chunk: Chunk, vectors: Sequence[str]) -> Tensor | None:
    """The stack of a whole tensor as matrices ``(S, rows, cols)``; a convolution is (out, everything else).

    None for tensors of fewer than two dimensions, with a side of length 1, or whose name matches one of
    the patterns ``vectors``: those are averaged.

    Raises:
        NonFiniteError: NaN or infinity, which a decomposition cannot let pass.
    """
    if len(chunk.shape) < 2 or any(fnmatchcase(chunk.name, pattern) for pattern in vectors):
        return None
    matrices = chunk.stack.reshape(len(chunk.stack), chunk.shape[0], -1)
    if min(matrices.shape[1:], default=0) < 2:
        return None
    if not matrices.isfinite().all():
        raise NonFiniteError(f"{chunk.name} holds NaN or infinity; exclude it: no decomposition of it exists")
    return matrices


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` leading singular triplets of ``(m, n)``: U ``(m, rank)``, S ``(rank,)``, V ``(rank, n)``.

    From the eigenvectors of the smaller Gram matrix in float64, which is several times faster than a
    singular value decomposition and as exact for leading triplets; they are kept on disk, see
    `decompositions`. A triplet of a zero singular value is zero.
    """
    if matrix.shape[0] > matrix.shape[1]:
        left, values, right = leading(matrix.T, rank)
        return right.T, values, left.T
    wide = matrix.double()
    if rank == 0 or not matrix.any():  # an expert that left this tensor alone
        rows, columns = matrix.shape
        return wide.new_zeros(rows, rank), wide.new_zeros(rank), wide.new_zeros(rank, columns)
    shapes = {"left": (len(matrix), rank), "squares": (rank,)}
    left, squares = kept("leading eigenvectors of the Gram matrix", wide, shapes, partial(_eigen, rank=rank))
    values = squares.clamp_min(0).sqrt()
    present = values > values.max() * 1e-7
    right = (left.T @ wide) * torch.where(present, 1 / values, 0.0)[:, None]
    return left * present, values * present, right


def _eigen(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Of ``matrix @ matrix.T`` the leading eigenvectors ``(m, rank)`` and eigenvalues, the largest first."""
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    return vectors[:, -rank:].flip(1), squares[-rank:].flip(0)


def orthogonalise(columns: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, ``(m, q) → (m, q)``; dependent columns stay dependent.

    The polar factor U (UᵀU)^(-1/2), with the pseudo-inverse where columns are linearly dependent. Columns of
    zeros stay zero.
    """
    there = columns.any(0)
    if not there.all():
        result = torch.zeros_like(columns)
        if there.any():
            result[:, there] = orthogonalise(columns[:, there])
        return result
    gram = columns.T @ columns
    compute = partial(_inverse_root, columns=columns)
    [inverse] = kept("inverse square root of a Gram matrix", gram, {"inverse": tuple(gram.shape)}, compute)
    return columns @ inverse


def _inverse_root(gram: Tensor, columns: Tensor) -> tuple[Tensor]:
    """The pseudo-inverse of a Gram matrix's square root, ``(q, q) → (q, q)``.

    The eigenvalues of the Gram matrix are squares, and of one below 1e-10 of the largest few digits are left.
    As many columns as rows come that close to dependence by chance (of a hundred 768 × 768 about one does),
    and their direction counts as much as any other: then singular values of the columns themselves decide.
    """
    squares, vectors = torch.linalg.eigh(gram)
    values, least = squares.clamp_min(0).sqrt(), 1e-5
    if values.min() <= values.max() * least:
        _, values, rows = torch.linalg.svd(columns, full_matrices=False)
        vectors, least = rows.T, 1e-9
    present = values > values.max() * least
    return ((vectors * torch.where(present, 1 / values, 0.0)) @ vectors.T,)
