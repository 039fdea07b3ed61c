"""Routers as what is learned: one flat row of numbers, written into them and its gradient read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..adaptation.coefficients import Layout
from ..plan import Entry


class RouterStore:
    """The parameters of routers in the place that a stack of vectors has when coefficients are learned.

    Args:
        parameters: of all routers, in order.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.learned = list(parameters)

    def entries(self) -> list[Entry]:
        """The tensors of the body that depend on what is learned: none."""
        return []

    def values(self) -> Tensor:
        """The parameters as they are, ``(1, P)`` float64 on the CPU."""
        flat = [parameter.detach().reshape(-1).cpu().double() for parameter in self.learned]
        return torch.cat(flat)[None]

    def materialise(self, targets: Mapping[str, Tensor], values: Tensor, where: Layout) -> None:
        """Write ``(1, P)`` values into the routers."""
        del targets, where
        start = 0
        with torch.no_grad():
            for parameter in self.learned:
                stop = start + parameter.numel()
                parameter.copy_(values[0, start:stop].view(parameter.shape))
                parameter.grad = None
                start = stop

    def pull_back(self, gradients: Mapping[str, Tensor], where: Layout) -> Tensor:
        """The gradient of the routers, ``(1, P)`` float64; they forget it."""
        del gradients, where
        parts = []
        for parameter in self.learned:
            found = parameter.grad
            parts.append(torch.zeros(parameter.numel()) if found is None else found.reshape(-1).cpu())
            parameter.grad = None
        return torch.cat(parts).double()[None]
