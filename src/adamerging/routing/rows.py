"""Whose rows: routing takes the samples of a batch to come first in every tensor, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adaptation.loop import Learner
from ..errors import UsageError
from ..tasks.capture import inputs_of
from .fastpath import parts_called

SAME = 1e-3
"""Rows are the same up to this share of their norm; those of other tokens or samples are not."""
_SHOWN = 3
_REMEDY = (
    "Routing takes the samples to be the first dimension: build the model so (batch_first=True of torch's "
    "transformers; the weights are the same), or choose other maps with adapt.route_options"
)


def samples_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """How many samples a model is called on: the first dimension of the first tensor; None without one."""
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim)
    first = next(tensors, None)
    return None if first is None else len(first)


def by_sample(rows: Tensor, batch: int, where: str) -> Tensor:
    """Rows of a batch as ``(B, T, D)``.

    Args:
        rows: ``(B, ..., D)``, ``(B · windows, ..., D)`` or ``(B · T, D)``.
        batch: B.
        where: what the message calls the place where they were found.

    Raises:
        UsageError: there are no such rows.
    """
    if len(rows) % batch:
        raise UsageError(f"{where}: {list(rows.shape)} is no batch of {batch} samples. {_REMEDY}")
    return rows.reshape(batch, -1, rows.shape[-1])


def check_samples_first(learner: Learner, maps: Mapping[str, nn.Module], device: torch.device) -> None:
    """Refuse a model that lays out a batch in another way, which shapes alone do not always tell.

    Two samples run in both orders: everywhere the first half of the rows must change places with the second.

    Args:
        learner: a task with its model.
        maps: the parts that are to be routed, by the names of their weights.
        device: where to run.

    Raises:
        UsageError: names the maps, and the shapes of what goes into them.
    """
    names = {id(part): name for name, part in maps.items()} | {id(learner.module): "the model"}
    pair = (2 * [*learner.train, *learner.held])[:2]
    seen = []
    for samples in (pair, pair[::-1]):
        with (
            parts_called(learner.module),
            inputs_of([learner.module, *maps.values()]) as found,
            torch.no_grad(),
        ):
            learner.task.forward(learner.module, learner.inputs(samples, device))
        seen.append(found)
    wrong = {
        names[id(part)]: f"{list(one.shape)} into {names[id(part)]}"
        for (part, one), (_, other) in zip(*seen, strict=False)
        if not _change_places(one, other)
    }
    if wrong:
        shown = ", ".join(list(wrong.values())[:_SHOWN])
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UsageError(
            f"task '{learner.task.name}': of a batch of 2 samples go {shown}{more}, and the first half of it "
            f"is not the first sample's. {_REMEDY}"
        )


def _change_places(one: Tensor, other: Tensor) -> bool:
    """Whether the halves of one are those of the other, the other way round."""
    if one.ndim == 0:
        return True
    if len(one) % 2 or one.shape != other.shape:
        return False
    first, second = one.float(), other.roll(len(other) // 2, 0).float()
    return not bool((first - second).norm() > SAME * first.norm())  # of NaN the loss will tell
