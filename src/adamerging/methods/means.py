"""The mean of a stack in shares: what methods do to the tensors that they have nothing to say about."""

from __future__ import annotations

from torch import Tensor

from ..errors import UsageError
from .stage import Chunk


def mean_rows(chunk: Chunk) -> Tensor:
    """Each row over the sum of the weights, ``(S, n)``: the weighted sum of the rows is the weighted mean.

    Raises:
        UsageError: the weights sum to 0.
    """
    total = chunk.weights.sum()
    if total == 0:
        raise UsageError(f"the weights of '{chunk.name}' sum to 0, so there is no weighted mean")
    return chunk.stack / total
