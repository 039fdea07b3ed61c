"""Gates: how much of each expert a sample takes, told by a small router from what goes into an MLP."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Flow:
    """What a forward pass carries past the layers between.

    Attributes:
        active: whether samples are routed; otherwise every layer is the plain one.
        mask: ``(B, T)``, which tokens are no padding, of the pass that runs; None where none was given.
    """

    active: bool = True
    mask: Tensor | None = None


@dataclass
class Gate:
    """The gates of one site in the pass that runs.

    Attributes:
        flow: of the model.
        values: ``(B, K)``; None before the first pass.
    """

    flow: Flow
    values: Tensor | None = field(default=None, repr=False)


class Router(nn.Module):
    """A two-layer MLP from token features to gates, which are averaged over the tokens.

    Args:
        width: of the features.
        hidden: width of the hidden layer.
        experts: number of gates.
    """

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden)
        self.second = nn.Linear(hidden, experts)

    @torch.no_grad()
    def start(self, std: float, gate: float, generator: torch.Generator) -> None:
        """Give first values: weights of this standard deviation, and gates about this value."""
        for layer in (self.first, self.second):
            noise = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
            layer.weight.copy_(noise * std)
        self.first.bias.zero_()
        self.second.bias.fill_(gate)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Gates ``(B, K)``.

        Args:
            features: ``(B, T, D)``, ``(B, ..., D)`` or ``(B, D)``; ``(B · T, D)`` where a mask tells B and T.
            mask: ``(B, T)``, which tokens count; all when None, or when it is no mask of these tokens.
        """
        tokens = features.reshape(len(features), -1, features.shape[-1])
        if mask is not None and features.ndim == 2 and len(features) == mask.numel() != len(mask):
            tokens = features.view(*mask.shape, -1)
        hidden = self.first(tokens).relu()
        # The second layer is linear: the mean of its outputs is its output for the mean, and that is cheaper.
        if mask is None or mask.shape != hidden.shape[:2]:
            mean = hidden.mean(1)
        else:
            weights = mask.to(hidden.dtype).unsqueeze(-1)
            mean = (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)
        gates: Tensor = self.second(mean)
        return gates
