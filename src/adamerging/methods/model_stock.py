"""Model Stock: how far towards the mean, told by the angle between task vectors."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from .gram import combine
from .registry import register
from .stage import Chunk, Method, Stage, Stream


@register(
    "model_stock",
    paper="Jang et al., Model Stock, 2024, arXiv 2403.19522",
    cost="two passes",
)
def model_stock(
    granularity: Literal["tensor", "row"] = "tensor",
    angle: Literal["cosine", "angle"] = "cosine",
    clamp: bool = True,
) -> Method:
    """Go t of the way from the base to the mean, t = K cos φ / ((K − 1) cos φ + 1), tensor by tensor.

    Made for several fine-tunings of the *same* task: task vectors of different tasks are nearly
    orthogonal, and then t ≈ 0 gives the base back.

    Args:
        granularity: one angle φ for each tensor, or for each output row (filter-wise).
        angle: average the pairwise cosines, or the pairwise angles.
        clamp: take t = 0, the base, where cos φ < 0. The formula was derived for acute angles; beyond 90° it
            gives t < 0, without bound, and moves away from the experts.
    """
    if granularity == "row":
        by_row = partial(_by_row, angle=angle, clamp=clamp)
        stage = Stage("stock ratio by row", by_row, scope="row", keeps_tasks=False)
        return Method("model_stock", reduce=stage, weighted=False, experts=(2, None))

    def coefficients(products: Tensor, stream: Stream) -> list[float]:
        count = len(stream.tasks)
        return [float(_ratio(products[None], angle, clamp)[0]) / count] * count

    return Method(
        "model_stock",
        reduce=combine("stock ratio", "task_vectors", coefficients),
        weighted=False,
        experts=(2, None),
    )


def _by_row(chunk: Chunk, _: None, angle: str, clamp: bool) -> Tensor:
    rows = chunk.stack.view(chunk.stack.shape[0], chunk.rows, -1).transpose(0, 1)
    ratio = _ratio((rows @ rows.mT).double(), angle, clamp).to(rows.dtype)
    return (rows.mean(1) * ratio[:, None]).reshape(1, -1)


def _ratio(products: Tensor, angle: str, clamp: bool) -> Tensor:
    """``(n, K, K)`` inner products → ``(n,)`` interpolation ratios; 0 where they are singular."""
    count = products.shape[-1]
    norms = products.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    scale = norms[:, :, None] * norms[:, None, :]
    cosines = torch.where(scale > 0, products / torch.where(scale > 0, scale, 1.0), 0.0).clamp(-1, 1)
    upper = torch.triu_indices(count, count, offset=1)
    pairs = cosines[:, upper[0], upper[1]]
    cosine = pairs.mean(1) if angle == "cosine" else pairs.arccos().mean(1).cos()
    if clamp:
        cosine = cosine.clamp_min(0)
    denominator = 1 + (count - 1) * cosine
    return torch.where(denominator.abs() < 1e-6, 0.0, count * cosine / denominator)
