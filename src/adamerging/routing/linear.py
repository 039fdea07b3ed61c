"""The modules that stand in a model for linear maps that are routed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .fastpath import call_parts
from .gates import Gate, Router
from .mixing import mixed_linear
from .rows import by_sample


class Routed(nn.Module):
    """What stands in a model for a linear map that is routed.

    Args:
        plain: the map it stands for, which runs instead while routing is off.
        gate: that it asks for the weights of the experts.
        name: of its weight, for messages.
    """

    def __init__(self, plain: nn.Module, gate: Gate, name: str) -> None:
        super().__init__()
        self.plain, self.gate, self.name = plain, gate, name
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


def put_in(module: nn.Module, routed: Mapping[int, Routed]) -> ExitStack:
    """Put routed maps into a module in the place of the plain ones.

    Args:
        module: a task's model.
        routed: what stands for a map, by the map's id.

    Returns:
        What takes them out again when it is closed.
    """
    undo = ExitStack()
    undo.callback(call_parts(module))
    for parent in list(module.modules()):
        for leaf, part in list(parent._modules.items()):
            if part is not None and id(part) in routed and not isinstance(parent, Routed):
                parent._modules[leaf] = routed[id(part)]
                undo.callback(parent._modules.__setitem__, leaf, part)
    return undo


class RoutedLinear(Routed):
    """A linear map with weights of its own for every sample: base + Σ_t gate_t · change_t.

    Args:
        plain: the map it stands for, which runs instead while routing is off.
        base: weight, and bias where there is one.
        change: ``(K, *shape)`` of each.
        gate: of its site.
        name: of its weight, for messages.
        router: that sets the gate, where this map is the first of its site.
    """

    def __init__(
        self,
        plain: nn.Module,
        base: tuple[nn.Parameter, nn.Parameter | None],
        change: tuple[nn.Parameter, nn.Parameter | None],
        gate: Gate,
        name: str,
        router: Router | None = None,
    ) -> None:
        super().__init__(plain, gate, name)
        self.router = router
        self.base_weight, self.base_bias = base
        self.change_weight, self.change_bias = change

    def forward(self, x: Tensor) -> Tensor:
        """``(B, ..., I) → (B, ..., O)``. Raises as `rows.by_sample`."""
        flow = self.gate.flow
        if not flow.active:
            plain: Tensor = self.plain(x)
            return plain
        kind = x.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        with torch.autocast(kind, enabled=False):
            if self.router is not None:
                tokens = flow.tokens(x, self.name)
                self.gate.values = self.router(tokens.to(self.base_weight.dtype), flow.mask)
            gates = self.gate.values
            assert gates is not None, "the first map of a site sets its gates"
            dtype = low or self.base_weight.dtype
            rows = by_sample(x, len(gates), self.name).to(dtype)
            found = mixed_linear(rows, gates.to(dtype), self.base_weight, self.change_weight, self.turned)
            if self.base_bias is not None and self.change_bias is not None:
                found = found + (self.base_bias + gates @ self.change_bias).to(dtype)[:, None]
        return found.view(*x.shape[:-1], -1).to(low or x.dtype)
