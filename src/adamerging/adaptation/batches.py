"""Which samples a step sees: a pure function of seed, task and step, so that a resumed run sees the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def _generator(*parts: object) -> np.random.Generator:
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def split(count: int, held_out: float, limit: int, seed: int, task: str) -> tuple[list[int], list[int]]:
    """Sample numbers to learn from and held out, disjoint; at least one is left to learn from."""
    order = _generator(seed, task, "split").permutation(count).tolist()
    held = min(int(count * held_out), limit, count - 1)
    return sorted(order[held:]), sorted(order[:held])


class Batches:
    """Endless batches of sample numbers.

    Args:
        samples: the numbers to draw from.
        size: samples a batch; all of them where there are fewer.
        seed, task: what the order depends on.
        costs: by sample number; when given, a batch holds samples of similar cost.
    """

    def __init__(
        self, samples: Sequence[int], size: int, seed: int, task: str, costs: Sequence[int] | None = None
    ) -> None:
        self.samples, self.size, self.seed, self.task, self.costs = list(samples), size, seed, task, costs
        self.count = max(1, len(self.samples) // size)
        self._epoch = -1
        self._batches: list[list[int]] = []

    def at(self, number: int) -> list[int]:
        """Batch ``number``, from 0. An epoch shows every sample at most once and drops the odd rest."""
        epoch, position = divmod(number, self.count)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._arrange(epoch)
        return self._batches[position]

    def _arrange(self, epoch: int) -> list[list[int]]:
        generator = _generator(self.seed, self.task, "epoch", epoch)
        order = [self.samples[i] for i in generator.permutation(len(self.samples))]
        order = order[: self.count * self.size]
        if self.costs is not None:
            costs = self.costs
            order.sort(key=lambda sample: costs[sample])  # stable: equal costs stay shuffled
        batches = [order[i : i + self.size] for i in range(0, len(order), self.size)]
        return [batches[i] for i in generator.permutation(len(batches))]
