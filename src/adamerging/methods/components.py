"""How a merge is a sum of rank-one components, so that each of them can be left out by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

Triplets = tuple[Tensor, Tensor, Tensor]
"""Left vectors ``(m, q)``, strengths ``(q,)``, right vectors ``(q, n)``: Σ s_i u_i v_iᵀ."""


@dataclass(frozen=True)
class Components:
    """What a method makes of the matrices of all experts, before it adds it up.

    Attributes:
        split: ``matrices (K, m, n) → triplets`` of each row: of what the experts share, if there is such a
            row, and then of each expert.
        ranks: ``(m, n, K) →`` how many triplets each row has.
        shared: whether the first row is what the experts share.
        centred: the rows are differences to the average of the experts, which is added once.
        strength: the coefficient that the rows are added with.
        kept: fraction of a matrix's rank that is added at all, the strongest components first.
    """

    split: Callable[[Tensor], Sequence[Triplets]]
    ranks: Callable[[int, int, int], Sequence[int]]
    shared: bool = False
    centred: bool = False
    strength: float = 1.0
    kept: float = 1.0
