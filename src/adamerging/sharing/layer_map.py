"""Which task has which layers of its own, and what a store of them weighs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..blocks import places
from ..weights import Weights
from ..weights.shared_store import Store, open_store, split_address

SHADES = " ░▒▓█"


@dataclass(frozen=True)
class LayerMap:
    """The map that the paper draws: tasks by layers, and the sizes behind it.

    Attributes:
        tasks: in the store's order.
        layers: those that had a gate in some task, or that some task has of its own, in the base's order.
        blocks: for each layer the block of the network that it is in; None outside.
        values: ``values[task][layer]``: whether the task has its own.
        scores: the same shape: the layer's score, or None where it had none.
        sizes: parameters of each layer.
        base: parameters of the base.
        parameters: of each task by kind: layers, own (norms, biases, statistics), head.
    """

    tasks: Sequence[str]
    layers: Sequence[str]
    blocks: Sequence[str | None]
    values: Sequence[Sequence[bool]]
    scores: Sequence[Sequence[float | None]]
    sizes: Sequence[int]
    base: int
    parameters: Mapping[str, Mapping[str, int]]

    @property
    def total(self) -> int:
        """Parameters of base and tasks together."""
        return self.base + sum(sum(own.values()) for own in self.parameters.values())

    @property
    def multiple(self) -> float:
        """Size of all in multiples of one model."""
        return self.total / self.base if self.base else 0.0

    def share(self, task: str) -> float:
        """Share of the layers that a task has of its own."""
        own = self.values[list(self.tasks).index(task)]
        return sum(own) / len(own) if own else 0.0

    @property
    def shared_by_all(self) -> list[str]:
        """Layers that no task changed: the base's in every task, so that a merge has nothing to weigh."""
        return [n for i, n in enumerate(self.layers) if not any(own[i] for own in self.values)]

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for records and JSON."""
        return {
            "tasks": list(self.tasks),
            "layers": list(self.layers),
            "blocks": list(self.blocks),
            "values": [[int(value) for value in own] for own in self.values],
            "scores": [list(own) for own in self.scores],
            "sizes": list(self.sizes),
            "base": self.base,
            "parameters": {task: dict(own) for task, own in self.parameters.items()},
            "multiple": self.multiple,
            "shares": {task: self.share(task) for task in self.tasks},
        }


def map_of_experts(experts: Mapping[str, Weights]) -> LayerMap | None:
    """The map of experts that are tasks of one store, under the names they have here; None for others."""
    found = {name: split_address(weights.label) for name, weights in experts.items()}
    addresses = {name: address for name, address in found.items() if address is not None}
    folders = {folder for folder, _ in addresses.values()}
    if len(addresses) != len(experts) or len(folders) != 1:
        return None
    store = open_store(folders.pop(), verify=False)  # it was verified when the experts were opened
    return layer_map(store, {name: task for name, (_, task) in addresses.items()})


def layer_map(store: Store, tasks: Mapping[str, str] | None = None) -> LayerMap:
    """The map of a store, from its index and the header of its base; no tensor is read.

    Args:
        store: opened.
        tasks: some of its tasks, by the names they shall have; all under their own when None.
    """
    named = tasks if tasks is not None else {name: name for name in store.index.tasks}
    records = {name: store.index.tasks[task] for name, task in named.items()}
    known = {name for record in records.values() for name in (*record.layers, *record.scores)}
    layers = [name for name in store.base.specs if name in known]
    where = places(store.base.specs)
    return LayerMap(
        tasks=list(records),
        layers=layers,
        blocks=[where[name].block for name in layers],
        values=[[name in set(record.layers) for name in layers] for record in records.values()],
        scores=[[record.scores.get(name) for name in layers] for record in records.values()],
        sizes=[store.base.specs[name].numel for name in layers],
        base=store.index.base.parameters,
        parameters={name: record.parameters for name, record in records.items()},
    )


def grid(found: LayerMap, width: int) -> list[str]:
    """The map as lines of text, a task each; where the layers are more than the width, a column is a block.

    Args:
        found: the map.
        width: characters that a task's cells may take.
    """
    if len(found.layers) <= width:
        return ["".join("█" if value else "·" for value in own) for own in found.values]
    lines = []
    for own in found.values:
        cells = _groups(found.blocks, own, width)
        lines.append("".join("·" if share == 0 else SHADES[max(1, round(4 * share))] for share in cells))
    return lines


def _groups(blocks: Sequence[str | None], own: Sequence[bool], width: int) -> list[float]:
    """Share of own layers by block, or by runs of equal length where there are too many blocks."""
    runs: list[list[bool]] = []
    last: object = object()
    for block, value in zip(blocks, own, strict=True):
        if block is None or block != last:
            runs.append([])
        runs[-1].append(value)
        last = block
    if len(runs) > width:
        step = -(-len(own) // width)
        runs = [list(own[i : i + step]) for i in range(0, len(own), step)]
    return [sum(run) / len(run) for run in runs]
