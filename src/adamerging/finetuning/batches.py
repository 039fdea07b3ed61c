"""In which order samples go through a model in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

STRETCH = 50
"""Batches within which samples are sorted by length: little padding, and still a random order."""


def shuffled(
    costs: Sequence[int] | None, count: int, size: int, generator: torch.Generator, least: int = 1
) -> list[Tensor]:
    """One epoch: every sample once, batches of like cost in random order.

    Args:
        costs: relative cost (token count) of each sample; None where all are alike.
        count: samples.
        size: samples a batch; the last may have fewer.
        generator: decides the order.
        least: a last batch of fewer joins the one before.

    Returns:
        The indices of each batch.
    """
    order = torch.randperm(count, generator=generator)
    if costs is None:
        return _joined(list(torch.split(order, size)), least)
    lengths = torch.tensor(costs)
    batches: list[Tensor] = []
    for stretch in torch.split(order, STRETCH * size):
        by_length = stretch[lengths[stretch].argsort(stable=True)]
        batches.extend(torch.split(by_length, size))
    batches = _joined(batches, least)
    return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]


def batch_count(count: int, size: int, least: int = 1) -> int:
    """How many batches `shuffled` makes."""
    whole, rest = divmod(count, size)
    return whole + (rest >= least if whole and rest else rest > 0)


def _joined(batches: list[Tensor], least: int) -> list[Tensor]:
    if len(batches) > 1 and len(batches[-1]) < min(least, len(batches[0])):
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def interleaved(
    epochs: Sequence[Sequence[Tensor]], generator: torch.Generator
) -> Iterator[tuple[int, Tensor]]:
    """The batches of several tasks in random order, each with the number of its task."""
    if len(epochs) == 1:
        yield from ((0, batch) for batch in epochs[0])
        return
    owners = torch.tensor([task for task, batches in enumerate(epochs) for _ in batches])
    waiting = [iter(batches) for batches in epochs]
    for index in torch.randperm(len(owners), generator=generator).tolist():
        task = int(owners[index])
        yield task, next(waiting[task])
