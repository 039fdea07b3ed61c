"""Routers as what is learned: one flat row of numbers, written into them and its gradient read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adaptation.coefficients import Layout
from ..plan import Entry


class Routers:
    """The parameters of routers as `adaptation.parametrisation.Learned`.

    Args:
        parameters: of all routers, in order.
        where: the experts and the sites, of which the mean gates are shown in the place of coefficients.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], where: Layout) -> None:
        self.learned = list(parameters)
        self.where = where

    def entries(self) -> Sequence[Entry]:
        """The tensors of the body that depend on what is learned: none."""
        return []

    def first(self) -> Tensor:
        """The parameters as they are, ``(1, P)`` float64 on the CPU."""
        flat = [parameter.detach().reshape(-1).cpu().double() for parameter in self.learned]
        return torch.cat(flat)[None]

    def materialise(self, targets: Mapping[str, Tensor], values: Tensor) -> None:
        """Write ``(1, P)`` values into the routers; the body stays."""
        del targets
        start = 0
        with torch.no_grad():
            for parameter in self.learned:
                stop = start + parameter.numel()
                parameter.copy_(values[0, start:stop].view(parameter.shape))
                parameter.grad = None
                start = stop

    def pull_back(self, gradients: Mapping[str, Tensor], values: Tensor) -> Tensor:
        """The gradient of the routers, ``(1, P)`` float64; they forget it."""
        del gradients, values
        parts = []
        for parameter in self.learned:
            found = parameter.grad
            parts.append(torch.zeros(parameter.numel()) if found is None else found.reshape(-1).cpu())
            parameter.grad = None
        return torch.cat(parts).double()[None]

    def clamped(self, values: Tensor) -> Tensor:
        """The values: no router has bounds."""
        return values

    def coefficients(self, values: Tensor) -> Tensor:
        """Mean gates ``(K, sites)``, which are given here: they depend on the inputs."""
        return values

    def count(self, values: Tensor) -> int:
        """How many numbers the routers have."""
        del values
        return sum(parameter.numel() for parameter in self.learned)

    def record(self, values: Tensor) -> Mapping[str, Any]:
        """Nothing: the folder of a model that routes has a record of its own."""
        del values
        return {}
