"""CART: task vectors centred at the average of the experts, cut to their leading directions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Annotated

from pydantic import Field
from torch import Tensor

from .components import Components, Triplets
from .options import Number
from .registry import register
from .spectral import changing_matrices, leading
from .stage import Chunk, Method


@register(
    "cart",
    paper="Choi et al., Revisiting Weight Averaging for Model Merging, 2024, arXiv 2412.12153",
    cost="of each matrix a decomposition for each expert",
)
def cart(
    rank: Annotated[float, Field(gt=0, le=1)] = 0.08,
    strength: Number = 2.3,
    as_vectors: list[str] | None = None,
) -> Method:
    """Average the experts, and add of each one's difference to the average the leading directions.

    The differences sum to zero, so what makes a merge other than the average is the cut to a low rank.
    Vectors and scalars are averaged.

    Args:
        rank: fraction of a matrix's singular directions that stay, at least one. The paper finds some 0.08
            best; its authors' later code uses 0.16 for 8 tasks.
        strength: λ of the differences, beside an average that counts once. The paper searches it on
            labelled data; 2.3 is what the later code has for 8 tasks on ViT-B/32.
        as_vectors: patterns of matrices to average like vectors; by default ``*text_projection*``.
    """
    change = partial(_centre_and_cut, fraction=rank, strength=strength)
    method = changing_matrices("cart", "centre and cut to a low rank", as_vectors, change)
    components = Components(
        _differences,
        lambda rows, columns, count: [min(rows, columns)] * count,
        centred=True,
        strength=strength,
        kept=rank,
    )
    return replace(method, components=components)


def _differences(matrices: Tensor) -> list[Triplets]:
    """All triplets of each expert's difference to the average."""
    return [leading(matrix - matrices.mean(0), min(matrix.shape)) for matrix in matrices]


def _centre_and_cut(_: Chunk, matrices: Tensor, fraction: float, strength: float) -> Tensor:
    rank = max(1, int(fraction * min(matrices.shape[1:])))
    average = matrices.mean(0)
    changed = (average / len(matrices)).expand_as(matrices).clone()
    for share, matrix in zip(changed, matrices, strict=True):
        left, values, right = leading(matrix - average, rank)
        share.add_((strength * (left * values) @ right).to(share.dtype))
    return changed
