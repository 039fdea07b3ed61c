"""Learned coefficients as plain data, task × group, to be stored with a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..adaptation.coefficients import Layout, table
from ..blocks import Place
from ..errors import UsageError
from ..geometry import ENTRANCE, EXIT


def coefficient_table(
    values: Sequence[Sequence[float]] | Tensor,
    tasks: Sequence[str],
    groups: Sequence[str],
    blocks: Sequence[str],
    granularity: str = "tensor",
) -> dict[str, Any]:
    """The table as a row's record holds it.

    Args:
        values: ``(tasks, groups)``.
        tasks: rows of the stack: the experts, perhaps before them a combined vector.
        groups: what one coefficient covers, in the network's order.
        blocks: the block that each group stands in.
        granularity: as learned.

    Raises:
        UsageError: the sizes do not match.
    """
    listed = values.tolist() if isinstance(values, Tensor) else [list(own) for own in values]
    if (
        len(listed) != len(tasks)
        or any(len(own) != len(groups) for own in listed)
        or len(blocks) != len(groups)
    ):
        raise UsageError(
            f"coefficients for {len(listed)} tasks, {len(tasks)} names of tasks, {len(groups)} of groups and "
            f"{len(blocks)} of blocks do not fit together"
        )
    return {
        "granularity": granularity,
        "tasks": list(tasks),
        "groups": list(groups),
        "blocks": list(blocks),
        "values": listed,
    }


def coefficients_of(values: Tensor, where: Layout, places: Mapping[str, Place]) -> dict[str, Any]:
    """The same of what adaptation learned; of rows the mean a tensor.

    Args:
        values: ``(S, width)`` coefficients as applied.
        where: their layout.
        places: of the tensors, see `blocks.places`.
    """
    records = table(values, where)
    groups = [str(record["group"]) for record in records]
    return coefficient_table(
        [[float(str(record[row])) for record in records] for row in where.rows],
        where.rows,
        groups,
        [_block(places[group]) if group in places else group for group in groups],
        where.granularity,
    )


def _block(place: Place) -> str:
    return place.block or (ENTRANCE if place.entrance else EXIT)
