"""Model Breadcrumbs: neither the largest values nor the small ones."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .options import Fraction
from .registry import register
from .selection import Top, find_top, keep, part_of
from .signs import disjoint, elect
from .stage import Chunk, Method, Stage, Stream


@register(
    "breadcrumbs",
    paper="Davari and Belilovsky, Model Breadcrumbs, 2024, arXiv 2312.06795",
    cost="three passes",
)
def breadcrumbs(
    density: Fraction = 0.14,
    outliers: Fraction = 0.01,
    granularity: Literal["tensor", "row"] = "tensor",
    consensus: bool = False,
) -> Method:
    """Of each tensor drop the largest values (outliers) and all small ones, then add what is left.

    Args:
        density: fraction of the values that stays (the paper drops the lowest 85 %).
        outliers: fraction of the largest values that is dropped.
        granularity: rank the values within each tensor (the paper), or within each row along the last
            dimension (the authors' code; tensors with short rows then lose everything).
        consensus: elect a sign for each position and add only what agrees (the TIES rule).
    """
    masks = (
        middle_of_tensor(density, outliers) if granularity == "tensor" else middle_of_rows(density, outliers)
    )
    if consensus:
        return Method("breadcrumbs", (masks, elect("none")), disjoint("sum"), scale=0.3)
    return Method("breadcrumbs", (masks,), scale=0.3)


def _ranks(numel: int, density: float, outliers: float) -> tuple[int, int]:
    """How many of the largest values are dropped, and how many are kept or dropped with them."""
    kept = part_of(numel, density)
    dropped = min(int(outliers * numel), numel - kept)
    return dropped, dropped + kept


def middle_of_tensor(density: Fraction, outliers: Fraction) -> Stage:
    """Keep the ranks in (outliers, outliers + density] of each tensor's magnitudes, exactly counted."""

    def survey(stream: Stream) -> list[tuple[Top, Top]]:
        pairs = zip(stream.settings(density), stream.settings(outliers), strict=True)
        ranks = [rank for pair in pairs for rank in _ranks(stream.numel(), *pair)]
        tops = find_top(stream, ranks, exact=True, rows=[i // 2 for i in range(len(ranks))])
        return list(zip(tops[::2], tops[1::2], strict=True))

    def apply(chunk: Chunk, tops: list[tuple[Top, Top]]) -> Tensor:
        kept = torch.empty_like(chunk.stack)
        for row, (upper, lower), out in zip(chunk.stack, tops, kept, strict=True):
            keep(row, lower, chunk.start, out).sub_(keep(row, upper, chunk.start))
        return kept

    return Stage("keep the middle of each tensor", apply, survey, reads=2)


def middle_of_rows(density: Fraction, outliers: Fraction) -> Stage:
    """Keep the ranks in (outliers, outliers + density] along the last dimension."""

    def apply(chunk: Chunk, _: None) -> Tensor:
        if not chunk.shape:
            return chunk.stack
        length = chunk.shape[-1]
        result = torch.zeros_like(chunk.stack)
        pairs = zip(chunk.settings(density), chunk.settings(outliers), strict=True)
        for row, (kept, dropped) in enumerate(pairs):
            first = int(dropped * length)
            lines = chunk.stack[row].view(-1, length)
            ranked = lines.abs().sort(dim=1, descending=True, stable=True).indices
            middle = ranked[:, first : first + int(kept * length)]
            result[row].view(-1, length).scatter_(1, middle, lines.gather(1, middle))
        return result

    return Stage("keep the middle of each row", apply, scope="row")
