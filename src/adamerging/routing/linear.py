"""The modules that stand in a model for linear maps that are routed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .gates import Gate, Router
from .mixing import mixed_linear


class Routed(nn.Module):
    """What stands in a model for a linear map that is routed.

    Args:
        plain: the map it stands for, which runs instead while routing is off.
        gate: that it asks for the weights of the experts.
    """

    def __init__(self, plain: nn.Module, gate: Gate) -> None:
        super().__init__()
        self.plain, self.gate = plain, gate
        self.turned = isinstance(plain, Conv1D)

    @property
    def weight(self) -> Tensor:
        """The plain map's: some models look at its dtype."""
        found: Tensor = self.plain.weight  # type: ignore[assignment]
        return found

    @property
    def bias(self) -> Tensor | None:
        """The plain map's."""
        found: Tensor | None = self.plain.bias  # type: ignore[assignment]
        return found


class RoutedLinear(Routed):
    """A linear map with weights of its own for every sample: base + Σ_t gate_t · change_t.

    Args:
        plain: the map it stands for, which runs instead while routing is off.
        base: weight, and bias where there is one.
        change: ``(K, *shape)`` of each.
        gate: of its site.
        router: that sets the gate, where this map is the first of its site.
    """

    def __init__(
        self,
        plain: nn.Module,
        base: tuple[nn.Parameter, nn.Parameter | None],
        change: tuple[nn.Parameter, nn.Parameter | None],
        gate: Gate,
        router: Router | None = None,
    ) -> None:
        super().__init__(plain, gate)
        self.router = router
        self.base_weight, self.base_bias = base
        self.change_weight, self.change_bias = change

    def forward(self, x: Tensor) -> Tensor:
        """``(B, ..., I) → (B, ..., O)``."""
        if not self.gate.flow.active:
            plain: Tensor = self.plain(x)
            return plain
        kind = x.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        with torch.autocast(kind, enabled=False):
            if self.router is not None:
                self.gate.values = self.router(x.to(self.base_weight.dtype), self.gate.flow.mask)
            gates = self.gate.values
            assert gates is not None, "the first map of a site sets its gates"
            dtype = low or self.base_weight.dtype
            rows = x.reshape(len(gates), -1, x.shape[-1]).to(dtype)
            found = mixed_linear(rows, gates.to(dtype), self.base_weight, self.change_weight, self.turned)
            if self.base_bias is not None and self.change_bias is not None:
                found = found + (self.base_bias + gates @ self.change_bias).to(dtype)[:, None]
        return found.view(*x.shape[:-1], -1).to(low or x.dtype)
