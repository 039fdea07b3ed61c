"""How the task vectors lie: lengths, angles, conflicts. Computes records, draws nothing.

One streaming pass over the tensors that a merge would merge. Sums are in float64 and added in the
tensors' order, so that the numbers do not depend on the number of threads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from .blocks import Place
from .methods.stage import Chunk
from .relatedness import UNRELATED, Relatedness
from .stream import StackStream, Workers
from .task_vectors import TaskVectors

ENTRANCE = "before the blocks"
EXIT = "outside the blocks"


@dataclass(frozen=True, slots=True)
class Length:
    """How far one expert moved.

    Attributes:
        norm: length of its task vector (Euclidean).
        relative: norm divided by the base's norm over the same tensors; 0 where the base is zero.
        unchanged: share of the values that are the base's.
        cosine: to the base, from a sample of the weights, as `merge` judges it.
        related: whether it looks fine-tuned from this base.
    """

    norm: float
    relative: float
    unchanged: float
    cosine: float
    related: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """How two task vectors lie to each other.

    Attributes:
        experts: the two names.
        cosine: of the angle between them; 0 where one is zero.
        conflicts: of the positions that both changed, the share whose signs differ; 0 without any.
        shared: share of all positions that both changed.
    """

    experts: tuple[str, str]
    cosine: float
    conflicts: float
    shared: float


@dataclass(frozen=True, slots=True)
class Block:
    """Lengths within one block of the network.

    Attributes:
        name: the block, such as ``encoder.layer.3``, or `ENTRANCE` or `EXIT`.
        base: norm of the base's values.
        norms: norm of each task vector, by expert.
    """

    name: str
    base: float
    norms: Mapping[str, float]


@dataclass(frozen=True)
class Geometry:
    """The geometry of some task vectors.

    Attributes:
        parameters: values of each task vector.
        experts: by name.
        pairs: every two experts, in the experts' order.
        blocks: in the order of the network: entrance, blocks, what follows.
        warnings: what should make a reader stop.
    """

    parameters: int
    experts: Mapping[str, Length]
    pairs: tuple[Pair, ...]
    blocks: tuple[Block, ...]
    warnings: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


@dataclass
class _Sums:
    """What one piece adds up to; all float64."""

    base: float
    numel: int
    gram: Tensor
    same: Tensor  # values that are the base's, by expert
    both: Tensor  # positions that both changed, by pair
    signs: Tensor  # of those, how many more agree in sign than differ

    def add(self, other: _Sums) -> None:
        self.base += other.base
        self.numel += other.numel
        self.gram += other.gram
        self.same += other.same
        self.both += other.both
        self.signs += other.signs


def geometry(
    vectors: TaskVectors, related: Mapping[str, Relatedness], *, threads: int | None = None
) -> Geometry:
    """Measure the task vectors; reads everything once.

    Args:
        vectors: base, experts and plan.
        related: the verdict on each expert, see `relatedness`.
        threads: threads to use; as many as torch uses when None.

    Raises:
        NonFiniteError: NaN or infinity in the weights.
    """
    blocks: dict[str, _Sums] = {}
    with Workers(threads) as workers:
        stream = StackStream(vectors, workers, (), (), vectors.entries())
        for place, sums in stream.map(_measure):
            label = _label(place)
            if label in blocks:
                blocks[label].add(sums)
            else:
                blocks[label] = sums
    total = _nothing(len(vectors.tasks))
    for sums in blocks.values():
        total.add(sums)
    lengths = _lengths(vectors, total, related)
    return Geometry(
        total.numel,
        lengths,
        _pairs(vectors, total),
        tuple(
            Block(name, sums.base**0.5, dict(zip(vectors.tasks, _norms(sums), strict=True)))
            for name, sums in sorted(blocks.items(), key=lambda item: _order(item[0]))
        ),
        tuple(_warnings(vectors, lengths)),
    )


def _nothing(count: int) -> _Sums:
    def square() -> Tensor:
        return torch.zeros(count, count, dtype=torch.float64)

    return _Sums(0.0, 0, square(), torch.zeros(count, dtype=torch.float64), square(), square())


def _measure(chunk: Chunk) -> tuple[Place, _Sums]:
    values = chunk.vectors.double()
    base = chunk.base.double()
    # Products of signs are whole numbers and a piece has fewer than 2**24: exact in float32.
    signs = chunk.vectors.sign()
    changed = signs.abs()
    return chunk.place, _Sums(
        float(base @ base),
        chunk.stop - chunk.start,
        values @ values.T,
        (chunk.stop - chunk.start) - changed.sum(1).double(),
        (changed @ changed.T).double(),
        (signs @ signs.T).double(),
    )


def _label(place: Place) -> str:
    return place.block if place.block is not None else ENTRANCE if place.entrance else EXIT


def _order(label: str) -> tuple[int, list[tuple[int, str]]]:
    """Entrance, blocks by their numbers (2 before 10), and what stands outside."""
    parts = [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", label)]
    return {ENTRANCE: 0, EXIT: 2}.get(label, 1), parts


def _norms(sums: _Sums) -> list[float]:
    return [float(value) for value in sums.gram.diagonal().sqrt()]


def _lengths(vectors: TaskVectors, total: _Sums, related: Mapping[str, Relatedness]) -> dict[str, Length]:
    base = total.base**0.5
    return {
        task: Length(
            norm,
            norm / base if base else 0.0,
            float(same) / total.numel if total.numel else 1.0,
            related[task].cosine,
            related[task].related,
        )
        for task, norm, same in zip(vectors.tasks, _norms(total), total.same, strict=True)
    }


def _pairs(vectors: TaskVectors, total: _Sums) -> tuple[Pair, ...]:
    norms = _norms(total)
    pairs = []
    for (i, first), (j, second) in combinations(enumerate(vectors.tasks), 2):
        both = float(total.both[i, j])
        length = norms[i] * norms[j]
        pairs.append(
            Pair(
                (first, second),
                float(total.gram[i, j]) / length if length else 0.0,
                (both - float(total.signs[i, j])) / 2 / both if both else 0.0,
                both / total.numel if total.numel else 0.0,
            )
        )
    return tuple(pairs)


def _warnings(vectors: TaskVectors, lengths: Mapping[str, Length]) -> list[str]:
    found = []
    for task, length in lengths.items():
        label = vectors.experts[task].label
        if not length.related:
            found.append(
                f"expert '{task}' ({label}) does not look fine-tuned from {vectors.base.label}: the cosine "
                f"between their weights is {length.cosine:.2f} (of a fine-tuned model about 1, at least "
                f"{UNRELATED}); merge refuses it"
            )
        elif not length.norm:
            found.append(f"expert '{task}' ({label}) is the base: no merged tensor differs")
    return found
