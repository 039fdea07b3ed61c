"""Which linear maps of a model are routed: the feed-forward maps of its blocks, by names and modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..blocks import Place
from ..errors import UsageError
from ..plan import Entry
from .fastpath import parts_called

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_WEIGHT = ".weight"
SHOWN = 6


@dataclass(frozen=True)
class Site:
    """The linear maps that share a router.

    Attributes:
        name: the block they are in; outside blocks, the map itself.
        maps: weight and bias (None without) of each by the base's names, in the order in which they run: what
            goes into the first goes into the router.
    """

    name: str
    maps: tuple[tuple[str, str | None], ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """All tensors of the maps."""
        return tuple(name for pair in self.maps for name in pair if name is not None)


def candidates(
    entries: Sequence[Entry],
    places: Mapping[str, Place],
    patterns: Sequence[str] | None,
    *,
    attention: bool = False,
) -> list[str]:
    """Names of the weights that may be routed, from names and shapes alone.

    Without patterns: matrices in a block; unless attention's are wanted too, those of which no part of the
    name below the block speaks of it.
    """
    found = []
    for entry in entries:
        if len(entry.spec.shape) != 2 or not entry.name.endswith(_WEIGHT):
            continue
        block = places[entry.name].block
        if patterns is not None:
            wanted = any(fnmatchcase(entry.name, pattern) for pattern in patterns)
        else:
            wanted = block is not None and (
                attention or not _ATTENTION.search(entry.name.removeprefix(block))
            )
        if wanted:
            found.append(entry.name)
    return found


def is_linear(part: nn.Module) -> bool:
    """Whether a module is a linear map: ``nn.Linear``, or the one of GPT-2 that stores it transposed."""
    return isinstance(part, (nn.Linear, Conv1D))


def input_width(part: nn.Module) -> int:
    """How many features go into a linear map."""
    weight = part.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[0 if isinstance(part, Conv1D) else 1])


def linear_maps(module: nn.Module, names: Mapping[int, str]) -> dict[str, nn.Module]:
    """The linear maps of a module by the base's name of their weight.

    Args:
        module: any.
        names: the base's name of a tensor, by its id.
    """
    found: dict[str, nn.Module] = {}
    for part in module.modules():
        weight = part._parameters.get("weight")
        if is_linear(part) and weight is not None and id(weight) in names:
            found[names[id(weight)]] = part
    return found


def order_of_running(parts: Mapping[str, nn.Module], run: Callable[[], object]) -> list[str]:
    """Names of the parts that a forward pass uses, in the order of their first use.

    Args:
        parts: by name.
        run: one forward pass of the model they are in.
    """
    seen: dict[str, None] = {}
    handles = [
        part.register_forward_pre_hook(lambda *_, name=name: seen.setdefault(name))
        for name, part in parts.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return list(seen)


def find_sites(
    module: nn.Module,
    names: Mapping[int, str],
    run: Callable[[], object],
    entries: Sequence[Entry],
    places: Mapping[str, Place],
    patterns: Sequence[str] | None,
    *,
    attention: bool = False,
) -> list[Site]:
    """The sites of a model, in the order in which they run.

    Args:
        module: the model.
        names: the base's name of each tensor of the body, by id.
        run: one forward pass of the model.
        entries: the tensors that some expert changed.
        places: of the tensors.
        patterns, attention: as `candidates` takes them.

    Raises:
        UsageError: nothing is found, or a pattern that fits no linear map.
    """
    maps = linear_maps(module, names)
    changed = {entry.name for entry in entries}
    found = candidates(entries, places, patterns, attention=attention)
    chosen = [name for name in found if name in maps]
    option = "adapt.route_options.maps" if attention else "adapt.route_options.mlp"
    if patterns is not None:
        idle = [pattern for pattern in patterns if not any(fnmatchcase(n, pattern) for n in chosen)]
        if idle:
            raise UsageError(
                f"{option}: {', '.join(map(repr, idle))} fits no weight of a linear map that "
                f"an expert changed; there are {_some(sorted(changed & set(maps)))}"
            )
    groups: dict[str, list[str]] = {}
    with parts_called(module):
        order = order_of_running({name: maps[name] for name in chosen}, run)
    for name in order:
        groups.setdefault(places[name].block or name.removesuffix(_WEIGHT), []).append(name)
    if patterns is None and not attention:  # a lone linear map is no MLP
        groups = {block: weights for block, weights in groups.items() if len(weights) > 1}
    if not groups:
        raise UsageError(
            f"no {'linear map' if attention else 'MLP'} was found to route: no block of the model runs "
            f"{'a linear map' if attention else 'two linear maps that are not attention and'} that an expert "
            f"changed. Say which to route: {option}, patterns such as '*.mlp.*'; linear maps here: "
            f"{_some(sorted(changed & set(maps)))}"
        )
    return [
        Site(block, tuple((weight, _bias(maps[weight], names)) for weight in weights))
        for block, weights in groups.items()
    ]


def _bias(part: nn.Module, names: Mapping[int, str]) -> str | None:
    bias = part._parameters.get("bias")
    return None if bias is None else names[id(bias)]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "none") + more
