"""A shared model and, for every input, some of each expert's compressed difference to it (Twin-Merging).

The weights of a sample are θ* + Σ_t w_t · SVD_r(θ_t − θ*), with w the softmax of a router that has learned
whose task's inputs are before it. Low rank makes them cheap: nothing is mixed, the factors of all experts go
one after the other through two products, in between each expert's share is weighed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import WeightsError
from ..methods.spectral import leading
from .fastpath import parts_called
from .gates import Flow, Gate, Router, mean_over_tokens
from .linear import Routed, put_in
from .rows import by_sample
from .sites import Site, linear_maps

LEFT, RIGHT = ".left", ".right"
"""What follows a weight's name in those of the factors of a difference."""


@dataclass(frozen=True)
class Factored:
    """Differences of one linear map, one of each expert, as they are stored.

    Attributes:
        left: ``(K, m, r)``.
        right: ``(K, r, n)``, so that ``left @ right`` has the weight's shape ``(m, n)``.
        bias: ``(K, O)``; None where the map has none.
    """

    left: nn.Parameter
    right: nn.Parameter
    bias: nn.Parameter | None


class FactoredLinear(Routed):
    """A linear map plus, for every sample, some of each expert's difference: Σ_t gate_t · left_t right_t.

    Args:
        plain: the shared map.
        change: the differences.
        gate: of the model.
        name: of its weight, for messages.
    """

    def __init__(self, plain: nn.Module, change: Factored, gate: Gate, name: str) -> None:
        super().__init__(plain, gate, name)
        self.left, self.right, self.change_bias = change.left, change.right, change.bias

    def forward(self, x: Tensor) -> Tensor:
        """``(B, ..., I) → (B, ..., O)``. Raises as `rows.by_sample`."""
        shared: Tensor = self.plain(x)
        if not self.gate.flow.active:
            return shared
        gates = self.gate.values
        assert gates is not None, "the model decides before its layers run"
        first, second = (self.left.mT, self.right.mT) if self.turned else (self.right, self.left)
        rows = by_sample(x, len(gates), self.name)
        inner = rows @ first.flatten(0, 1).T  # (B, T, K · r)
        inner = inner * gates.repeat_interleave(first.shape[1], 1).to(inner.dtype)[:, None]
        change = inner @ second.mT.flatten(0, 1)
        if self.change_bias is not None:
            change = change + (gates.to(self.change_bias.dtype) @ self.change_bias)[:, None]
        return shared + change.reshape(shared.shape).to(shared.dtype)


@dataclass
class TwinRoutes:
    """Compressed differences and the router that weighs them, shared by the modules of all tasks.

    Attributes:
        tasks: the experts' names, in the order of the weights.
        sites: the routed maps by block, in the order in which they run.
        changes: of each map by the name of its weight.
        router: from features to scores of the tasks.
        flow: switches routing on and off for all modules.
        gates: the one gate of the model.
    """

    tasks: tuple[str, ...]
    sites: Sequence[Site]
    changes: Mapping[str, Factored]
    router: Router
    flow: Flow = field(default_factory=Flow)
    gates: list[Gate] = field(init=False)

    def __post_init__(self) -> None:
        self.gates = [Gate(self.flow)]

    @property
    def groups(self) -> tuple[str, ...]:
        """What each gate is of."""
        return ("model",)

    @property
    def what(self) -> str:
        """What is routed, in words."""
        return f"{sum(len(site.maps) for site in self.sites)} linear maps"

    def parameters(self) -> list[nn.Parameter]:
        """Those of the router, in order."""
        return list(self.router.parameters())

    def by_task(self) -> Mapping[str, Tensor]:
        """What is stored of every expert, stacked over them, by name."""
        found: dict[str, Tensor] = {}
        for site in self.sites:
            for weight, bias in site.maps:
                change = self.changes[weight]
                found |= {f"{weight}{LEFT}": change.left, f"{weight}{RIGHT}": change.right}
                if bias is not None and change.bias is not None:
                    found[bias] = change.bias
        return found

    def learned(self) -> dict[str, Tensor]:
        """Tensors of the router, by name."""
        return {f"0.{name}": tensor for name, tensor in self.router.state_dict().items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that is stored, by name."""
        return {**self.by_task(), **self.learned()}

    def stored(self) -> int:
        """Numbers that a model keeps for routing."""
        return sum(tensor.numel() for tensor in self.state_dict().values())

    def weights(self, features: Tensor) -> Tensor:
        """Weights of the experts ``(B, K)`` for features ``(B, D)``; they sum to one."""
        return self.scores(features).softmax(-1)

    def scores(self, features: Tensor) -> Tensor:
        """Logits of the tasks ``(B, K)``; features are normalised first, so that their scale is no matter."""
        dtype = self.router.first.weight.dtype
        with torch.autocast(features.device.type, enabled=False):
            normal = nn.functional.layer_norm(features.to(dtype), features.shape[-1:])
            found: Tensor = self.router(normal)
        return found

    def install(self, module: nn.Module, names: Mapping[int, str], label: str) -> Callable[[], None]:
        """Put routed maps into a module in the place of the plain ones. See `routes.Routes.install`."""
        maps = linear_maps(module, names)
        lacking = [w for site in self.sites for w, _ in site.maps if w not in maps]
        if lacking:
            raise WeightsError(f"{label} lacks linear maps that are routed: {', '.join(lacking[:5])}")
        routed: dict[int, Routed] = {
            id(maps[weight]): FactoredLinear(maps[weight], self.changes[weight], self.gates[0], weight).eval()
            for site in self.sites
            for weight, _ in site.maps
        }
        undo = put_in(module, routed)
        decide = partial(self._decide, self.block_in(module))
        undo.callback(module.register_forward_pre_hook(decide, with_kwargs=True).remove)
        undo.callback(module.register_forward_hook(self.flow.end, always_call=True).remove)
        return undo.close

    def block_in(self, module: nn.Module) -> str:
        """Path of the block, in a module with routed maps, whose output are the features."""
        last = self.changes[self.sites[-1].maps[-1][0]]
        parts = (part for part in module.modules() if isinstance(part, FactoredLinear))
        return block_of(module, next(part for part in parts if part.left is last.left))

    def _decide(self, block: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Weigh the experts for the batch that comes, by a pass of the shared model."""
        self.flow.begin(module, args, kwargs)
        if not self.flow.active:
            return
        with torch.no_grad():
            with looking(module, block, self.flow) as seen:
                module.forward(*args, **kwargs)
            self.gates[0].values = self.weights(seen[-1])


def block_of(module: nn.Module, part: nn.Module) -> str:
    """The path of the block that holds a part of a module: up to the first number; else the part's own."""
    path = next(path for path, other in module.named_modules() if other is part).split(".")
    first = next((place for place, name in enumerate(path) if name.isdigit()), len(path) - 1)
    return ".".join(path[: first + 1])


@contextmanager
def looking(module: nn.Module, block: str, flow: Flow) -> Iterator[list[Tensor]]:
    """Within, forward passes are those of the shared model, and their features ``(B, D)`` are listed.

    Args:
        module: a task's model.
        block: path of the part whose output, averaged over the tokens, are the features.
        flow: of the routes.
    """
    found: list[Tensor] = []

    def take(part: nn.Module, args: Any, output: Any) -> None:
        del part, args
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        found.append(mean_over_tokens(flow.tokens(hidden, block), flow.mask))

    active, handle = flow.active, module.get_submodule(block).register_forward_hook(take)
    flow.active = False
    try:
        with parts_called(module):  # with a whole tensor from each
            yield found
    finally:
        handle.remove()
        flow.active = active


def rank_of(fraction: float, shape: Sequence[int]) -> int:
    """How many directions of a matrix are kept."""
    return max(1, round(fraction * min(shape)))


def compress(differences: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """The leading directions of each matrix: ``(K, m, n) → (K, m, r), (K, r, n)``.

    Args:
        differences: float32 or float64.
        fraction: of the directions that stay; one at least.
    """
    rank = rank_of(fraction, differences.shape[1:])
    lefts, rights = [], []
    for matrix in differences:
        left, values, right = leading(matrix, rank)
        lefts.append(left * values)
        rights.append(right)
    return torch.stack(lefts).to(differences.dtype), torch.stack(rights).to(differences.dtype)


def make_twin(
    tasks: Sequence[str],
    sites: Sequence[Site],
    tensors: Mapping[str, Tensor],
    width: int,
    hidden: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> TwinRoutes:
    """Routes from tensors ``NAME.left``, ``NAME.right`` and biases, with a router that has no values yet.

    Args:
        tasks: the experts.
        sites: what is routed.
        tensors: stacked over the experts.
        width: of the features.
        hidden: of the router; the width when None.
        dtype: of everything.
        device: where it lives.
    """

    def fixed(name: str) -> nn.Parameter:
        return nn.Parameter(tensors[name].to(device, dtype), requires_grad=False)

    changes = {
        weight: Factored(
            fixed(f"{weight}{LEFT}"), fixed(f"{weight}{RIGHT}"), None if bias is None else fixed(bias)
        )
        for site in sites
        for weight, bias in site.maps
    }
    router = Router(width, hidden or width, len(tasks)).to(device, dtype).requires_grad_(False)
    return TwinRoutes(tuple(tasks), tuple(sites), changes, router)
