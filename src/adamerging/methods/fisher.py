"""Fisher merging: a mean in which each value of an expert weighs as much as its predictions depend on it."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from .means import mean_rows
from .registry import register
from .stage import Chunk, Method, Stage, Statistics, Stream


@register(
    "fisher",
    paper="Matena and Raffel, Merging Models with Fisher-Weighted Averaging, 2022, arXiv 2111.09832",
    needs="unlabeled data of every task",
    cost="a forward and a backward pass for each input, and two passes over the weights",
)
def fisher(
    samples: Annotated[int, Field(ge=1)] = 256,
    labels: Literal["sampled", "expected"] = "sampled",
    normalise: bool = True,
    floor: Annotated[float, Field(gt=0)] = 1e-6,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> Method:
    """A mean of the experts in which each value weighs by its Fisher information on unlabeled inputs.

    θ = Σ F_t θ_t / Σ F_t, where F_t is the mean over inputs x of (∂ log p(y|x) / ∂θ)², of each example by
    itself, with y drawn from what expert t predicts for x. Tensors without a gradient are averaged.

    Args:
        samples: of each task, at most.
        labels: y ``sampled``, one an input; or ``expected``, all classes by their probability, at the price
            of a backward pass for each.
        normalise: divide each F_t by its Euclidean norm over the whole model, or else experts with
            uncertain predictions outweigh the others.
        floor: least value of F_t, so that values no prediction depends on are averaged.
        seed: of the choice of samples, and of the labels.
    """

    def survey(stream: Stream) -> Tensor:
        total = torch.zeros(len(stream.tasks), dtype=torch.float64)
        for part in stream.map(_squares):
            total += part
        return torch.where(total > 0, total.sqrt(), 1.0)

    def apply(chunk: Chunk, norms: Tensor | None) -> Tensor:
        if all(values is None for values in chunk.statistics):
            return mean_rows(chunk)
        information = torch.zeros_like(chunk.stack)
        for row, values in enumerate(_pieces(chunk)):
            if values is not None:
                information[row] = values if norms is None else values / float(norms[row])
        information.clamp_(min=floor)
        return chunk.stack * information / (chunk.weights @ information)

    stage = Stage("weigh by information", apply, survey if normalise else None, per="model")
    return Method(
        "fisher", (stage,), seed=seed, statistics=Statistics("fisher", samples, seed, labels=labels)
    )


def _pieces(chunk: Chunk) -> list[Tensor | None]:
    """Each expert's statistics of the chunk's values ``(n,)``."""
    return [
        None if values is None else values.reshape(-1)[chunk.start : chunk.stop]
        for values in chunk.statistics
    ]


def _squares(chunk: Chunk) -> Tensor:
    """``(K,)`` float64 squared norms of the chunk's statistics."""
    sums = [0.0 if values is None else float(values.double().square().sum()) for values in _pieces(chunk)]
    return torch.tensor(sums or [0.0] * len(chunk.tasks), dtype=torch.float64)
