"""What makes a model route: the sites' weights and routers, put into modules and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import WeightsError
from .gates import Flow, Gate, Router
from .linear import Routed, RoutedLinear, put_in
from .sites import Site, linear_maps


@dataclass
class Routes:
    """Sites with their weights, shared by the modules of all tasks they are put into.

    Attributes:
        tasks: the experts' names, in the order of the gates.
        sites: in the order in which they run.
        base: tensors of the routed maps by name.
        changes: ``(K, *shape)`` by name.
        routers: one a site.
        flow: switches routing on and off for all modules.
        gates: one a site.
    """

    tasks: tuple[str, ...]
    sites: Sequence[Site]
    base: Mapping[str, nn.Parameter]
    changes: Mapping[str, nn.Parameter]
    routers: Sequence[Router]
    flow: Flow = field(default_factory=Flow)
    gates: list[Gate] = field(init=False)

    def __post_init__(self) -> None:
        self.gates = [Gate(self.flow) for _ in self.sites]

    @property
    def groups(self) -> tuple[str, ...]:
        """What each gate is of."""
        return tuple(site.name for site in self.sites)

    @property
    def what(self) -> str:
        """What is routed, in words."""
        return f"{len(self.sites)} MLPs"

    def parameters(self) -> list[nn.Parameter]:
        """Those of the routers, in order."""
        return [parameter for router in self.routers for parameter in router.parameters()]

    def by_task(self) -> Mapping[str, Tensor]:
        """What is stored of every expert, stacked over them, by name."""
        return self.changes

    def learned(self) -> dict[str, Tensor]:
        """Tensors of the routers, by name."""
        return {
            f"{number}.{name}": tensor
            for number, router in enumerate(self.routers)
            for name, tensor in router.state_dict().items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that is stored, by name."""
        found: dict[str, Tensor] = {f"base.{name}": tensor for name, tensor in self.base.items()}
        found |= {f"change.{name}": tensor for name, tensor in self.changes.items()}
        return found | self.learned()

    def stored(self) -> int:
        """Numbers that a model keeps for routing: base and change of every map, and the routers."""
        return sum(tensor.numel() for tensor in self.state_dict().values())

    def install(self, module: nn.Module, names: Mapping[int, str], label: str) -> Callable[[], None]:
        """Put routed maps into a module in the place of the plain ones.

        Args:
            module: a task's model.
            names: the base's name of each tensor of the body, by its id.
            label: what messages call the model.

        Returns:
            What takes them out again.

        Raises:
            WeightsError: the module lacks one of the maps.
        """
        maps = linear_maps(module, names)
        lacking = [w for site in self.sites for w, _ in site.maps if w not in maps]
        if lacking:
            raise WeightsError(f"{label} lacks linear maps that are routed: {', '.join(lacking[:5])}")
        routed: dict[int, Routed] = {}
        for site, gate, router in zip(self.sites, self.gates, self.routers, strict=True):
            for number, pair in enumerate(site.maps):
                plain = maps[pair[0]]
                routed[id(plain)] = RoutedLinear(
                    plain,
                    _of(self.base, pair),
                    _of(self.changes, pair),
                    gate,
                    pair[0],
                    router if number == 0 else None,
                ).eval()
        undo = put_in(module, routed)
        undo.callback(module.register_forward_pre_hook(self.flow.begin, with_kwargs=True).remove)
        undo.callback(module.register_forward_hook(self.flow.end, always_call=True).remove)
        return undo.close


def _of(
    tensors: Mapping[str, nn.Parameter], pair: tuple[str, str | None]
) -> tuple[nn.Parameter, nn.Parameter | None]:
    weight, bias = pair
    return tensors[weight], None if bias is None else tensors[bias]


def make_routes(
    tasks: Sequence[str],
    sites: Sequence[Site],
    base: Mapping[str, Tensor],
    changes: Mapping[str, Tensor],
    inputs: Sequence[int],
    hidden: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Routes:
    """Routes with routers that have no values yet.

    Args:
        tasks: the experts.
        sites: what is routed.
        base, changes: tensors by name.
        inputs: width of what goes into each site.
        hidden: of the routers; the width of their input when None.
        dtype: of everything.
        device: where it lives.
    """

    def fixed(tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        return {
            name: nn.Parameter(tensor.to(device, dtype), requires_grad=False)
            for name, tensor in tensors.items()
        }

    routers = [
        Router(width, hidden or width, len(tasks)).to(device, dtype).requires_grad_(False) for width in inputs
    ]
    return Routes(tuple(tasks), tuple(sites), fixed(base), fixed(changes), routers)
