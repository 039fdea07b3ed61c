"""In which order the parts of a model run: blocks, and linear maps outside them each by itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...blocks import Place


@dataclass(frozen=True)
class Order:
    """The tensors of a model by when they run.

    Attributes:
        groups: names of the tensors of each block with linear maps, in order; of a map outside, its own.
        rest: names of all other tensors.
        again: numbers of the groups that run again after a later one.
    """

    groups: Sequence[Sequence[str]]
    rest: Sequence[str]
    again: frozenset[int]

    def is_after(self, name: str, number: int) -> bool:
        """Whether a group needs nothing more of a forward pass once the map of this name is about to run."""
        return number not in self.again and any(name in group for group in self.groups[number + 1 :])


def order_of(traces: Iterable[Sequence[str]], names: Iterable[str], places: Mapping[str, Place]) -> Order:
    """The order that forward passes show.

    Args:
        traces: of each task, the names of the weights in the order of their use.
        names: of all tensors.
        places: which block each belongs to.
    """
    order: list[str] = []
    runs = [[places[name].block or name for name in trace] for trace in traces]
    for run in runs:
        at = 0
        for group in dict.fromkeys(run):
            if group in order:
                at = max(at, order.index(group) + 1)
            else:  # where it stands among those that this task has too
                order.insert(at, group)
                at += 1
    again = set()
    for run in runs:
        latest = -1
        for group in run:
            number = order.index(group)
            if number < latest:
                again.add(number)
            latest = max(latest, number)
    members: dict[str, list[str]] = {group: [] for group in order}
    rest: list[str] = []
    for name in names:
        members.get(places[name].block or name, rest).append(name)
    return Order([members[group] for group in order], rest, frozenset(again))
