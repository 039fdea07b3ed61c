"""Weighted averaging of the experts' weights."""

from __future__ import annotations

from torch import Tensor

from .gram import Of
from .registry import register
from .stage import Chunk, Method, Stage


@register("weighted", paper="Wortsman et al., Model soups, 2022, arXiv 2203.05482")
def weighted(normalise: bool = True, of: Of = "task_vectors") -> Method:
    """Weighted mean of the experts' weights, base + Σ w τ / Σ w.

    Args:
        normalise: divide by the sum of the weights; without it the result is base + Σ w τ.
        of: what is summed. Without `normalise`, ``weights`` gives Σ w θ, on which the base has no say; with
            it both are the same.
    """
    if of == "weights" and not normalise:
        return Method("weighted", reduce=sum_of_weights())
    return Method("weighted", normalise=normalise)


def sum_of_weights() -> Stage:
    """The reducer Σ w θ, as its difference to the base."""

    def apply(chunk: Chunk, _: None) -> Tensor:
        merged = chunk.weights @ chunk.stack
        return merged.add_(chunk.base, alpha=float(chunk.weights.sum()) - 1.0).unsqueeze(0)

    return Stage("weighted sum of the weights", apply, keeps_tasks=False)
