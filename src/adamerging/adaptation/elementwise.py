"""Adam on a coefficient for every value of every task vector, in the memory of a few copies of the values.

    merged = base + Σ_k α_k ⊙ τ_k          ∂L/∂α_k = g ⊙ τ_k          with g = ∂L/∂merged

All coefficients of one value follow the same g, so Adam's two means of ∂L/∂α_k are τ_k · m and τ_k² · v with
the means m, v of g and g². Its step for α_k, times τ_k and summed over k, is what the merged value moves by:

    merged ← merged − lr · Σ_k τ_k² m̂ / (|τ_k| √v̂ + ε)

So the coefficients themselves need not be held, and neither do K pairs of means.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class ElementwiseAdam:
    """Adam (arXiv 1412.6980) on the coefficients, as torch.optim.Adam would do it on all of them.

    Args:
        merged: ``(n,)`` merged values at the start; moved in place.
        sizes: ``(K, n)`` magnitudes of the task vectors, same dtype and device.
        lr: learning rate of the coefficients.
        betas, eps: of Adam.
    """

    def __init__(
        self,
        merged: Tensor,
        sizes: Tensor,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.merged, self.sizes = merged, sizes
        self.lr, self.betas, self.eps = lr, betas, eps
        self.mean, self.square = torch.zeros_like(merged), torch.zeros_like(merged)
        self.steps = 0

    def step(self, gradient: Tensor, piece: int = 1 << 15) -> None:
        """Move the merged values by one step of all coefficients.

        Args:
            gradient: ``(n,)`` g.
            piece: values at a time, so that what is computed of them stays in a core's cache.
        """
        self.steps += 1
        first, second = (1 - beta**self.steps for beta in self.betas)
        if self.merged.device.type != "cpu":
            piece = max(1, len(self.merged))
        for start in range(0, len(self.merged), piece):
            own = slice(start, start + piece)
            g, mean, square, sizes = gradient[own], self.mean[own], self.square[own], self.sizes[:, own]
            mean.lerp_(g, 1 - self.betas[0])
            square.mul_(self.betas[1]).addcmul_(g, g, value=1 - self.betas[1])
            spread = square.sqrt().div_(math.sqrt(second))
            rate = (sizes * sizes).div_((sizes * spread).add_(self.eps)).sum(0)
            self.merged[own].addcmul_(mean, rate, value=-self.lr / first)
