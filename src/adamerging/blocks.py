"""Which block of a network a tensor belongs to, told from its name.

A block is a numbered part: ``encoder.layer.3.attention.self.query.weight`` is in block 3 of the stack
``encoder.layer``. Stacks whose names differ only in digits (``layer1.0``, ``layer1.1``, ``layer2.0``)
are one after the other; other stacks (an encoder, a decoder) stand side by side.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_NUMBERED = re.compile(r"^(?P<stack>.*?[^.\d][^.]*|[^.\d][^.]*)\.(?P<index>\d+)(?:\.|$)|^(?P<bare>\d+)\.")
_ENTRANCE = re.compile(r"emb|wte|wpe|patch|stem|conv1|conv_stem|cls_token|class_|position", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands.

    Attributes:
        block: the block's name, such as ``encoder.layer.3``, or None outside the blocks.
        index: the block's number among those of its family, from 0; None outside.
        count: how many blocks the family has; 0 outside.
    """

    block: str | None
    index: int | None
    count: int
    entrance: bool

    @property
    def depth(self) -> float:
        """Relative depth in [0, 1]; outside the blocks 0 for embeddings and stems, 1 for what follows."""
        if self.index is None:
            return 0.0 if self.entrance else 1.0
        return self.index / (self.count - 1) if self.count > 1 else 1.0


def _split(name: str) -> tuple[str, int] | None:
    match = _NUMBERED.match(name)
    if match is None:
        return None
    if match["bare"] is not None:
        return "", int(match["bare"])
    return match["stack"], int(match["index"])


def places(names: Iterable[str]) -> Mapping[str, Place]:
    """The place of every tensor name, from the names alone (their order does not matter)."""
    names = list(names)
    found = {name: _split(name) for name in names}
    families: dict[str, set[tuple[tuple[int, ...], int]]] = {}
    for split in found.values():
        if split is not None:
            family, digits = _family(split[0])
            families.setdefault(family, set()).add((digits, split[1]))
    ranks = {
        family: {key: rank for rank, key in enumerate(sorted(members))}
        for family, members in families.items()
    }
    result = {}
    for name, split in found.items():
        if split is None:
            result[name] = Place(None, None, 0, bool(_ENTRANCE.search(name)))
            continue
        family, digits = _family(split[0])
        block = f"{split[0]}.{split[1]}" if split[0] else str(split[1])
        result[name] = Place(block, ranks[family][digits, split[1]], len(ranks[family]), False)
    return result


def _family(stack: str) -> tuple[str, tuple[int, ...]]:
    return re.sub(r"\d+", "#", stack), tuple(int(digits) for digits in re.findall(r"\d+", stack))
