"""Which samples a step sees: a pure function of seed, task and step, so that a resumed run sees the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def generator(*parts: object) -> np.random.Generator:
    """Random numbers that depend on these parts alone."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def split(count: int, held_out: float, limit: int, seed: int, task: str) -> tuple[list[int], list[int]]:
    """Sample numbers to learn from and held out, disjoint; at least one is left to learn from."""
    order = generator(seed, task, "split").permutation(count).tolist()
    held = min(int(count * held_out), limit, count - 1)
    return sorted(order[held:]), sorted(order[:held])


def some(count: int, most: int, seed: int, task: str) -> list[int]:
    """Numbers of samples drawn at random, in order; all where there are no more than ``most``."""
    return sorted(generator(seed, task, "some").permutation(count)[:most].tolist())


class Batches:
    """Endless batches of sample numbers.

    Args:
        samples: the numbers to draw from.
        size: samples a batch; all of them where there are fewer.
        seed, task: what the order depends on.
        costs: by sample number; when given, a batch holds samples of similar cost.
        most: the most a batch may cost, padded to its costliest sample; samples that cost much come in
            smaller batches. Only with `costs`.
    """

    def __init__(
        self,
        samples: Sequence[int],
        size: int,
        seed: int,
        task: str,
        costs: Sequence[int] | None = None,
        most: int | None = None,
    ) -> None:
        self.samples, self.size, self.seed, self.task = list(samples), size, seed, task
        self.costs, self.most = costs, most
        self._epoch, self._batches = 0, self._arrange(0)
        self.count = len(self._batches)

    def at(self, number: int) -> list[int]:
        """Batch ``number``, from 0. An epoch shows every sample at most once.

        Without costs the odd rest of an epoch is dropped; with them no sample is.
        """
        epoch, position = divmod(number, self.count)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._arrange(epoch)
        return self._batches[position]

    def _arrange(self, epoch: int) -> list[list[int]]:
        chance = generator(self.seed, self.task, "epoch", epoch)
        order = [self.samples[i] for i in chance.permutation(len(self.samples))]
        if self.costs is None:
            whole = max(1, len(order) // self.size) * self.size
            batches = [order[i : i + self.size] for i in range(0, min(whole, len(order)), self.size)]
        else:
            batches = self._alike(order, self.costs)
        return [batches[i] for i in chance.permutation(len(batches))]

    def _alike(self, order: list[int], costs: Sequence[int]) -> list[list[int]]:
        """Samples of similar cost together; the sizes of the batches are the same in every epoch."""
        batches: list[list[int]] = [[]]
        for sample in sorted(order, key=lambda sample: costs[sample]):  # stable: equal costs stay shuffled
            full = len(batches[-1]) == self.size
            dear = self.most is not None and (len(batches[-1]) + 1) * costs[sample] > self.most
            if batches[-1] and (full or dear):
                batches.append([])
            batches[-1].append(sample)
        return batches
