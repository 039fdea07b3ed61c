"""Exact selection of the largest magnitudes of a vector that never is in memory as a whole.

The bits of a non-negative float, read as an integer, sort as the float does. So the magnitude of a
given rank is found digit by digit: a histogram of the leading 16 bits tells the leading digit of the
answer, a second one over the values that begin with it tells the next, and so on (two passes for
float32, four for float64). No sort, no copy of the vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .stage import Chunk, Stream

_DIGIT = 16


@dataclass(frozen=True, slots=True)
class Top:
    """The largest magnitudes of one row of the stack.

    Attributes:
        threshold: they are all at least this large; infinity when none is selected.
        last: where `threshold` is shared by more values than fit, the flat position of the last one
            that is selected (the first in order win); None when all of them are.
    """

    threshold: float
    last: int | None = None


def part_of(numel: int, fraction: float) -> int:
    """``int(fraction · numel)``, but at least one value of a non-empty vector when fraction > 0."""
    return min(numel, max(int(fraction * numel), 1 if fraction > 0 else 0))


def find_top(stream: Stream, counts: Sequence[int], *, exact: bool) -> list[Top]:
    """For each row of the stream's stack, what the ``counts[row]`` largest magnitudes are.

    Args:
        stream: of one tensor, or of all.
        counts: how many values to select in each row.
        exact: select exactly so many, even where equal values straddle the border (the first ones in
            the tensor win; one tensor only). Otherwise all values equal to the threshold are selected.
    """
    found = _magnitudes_at_rank(stream, counts)
    tops = [Top(threshold) for threshold, _ in found]
    short = [row for row, (_, spare) in enumerate(found) if spare > 0]
    if not exact or not short:
        return tops

    def ties(chunk: Chunk) -> list[Tensor]:
        return [
            (chunk.stack[row].abs() == tops[row].threshold).nonzero()[:, 0] + chunk.start for row in short
        ]

    positions = [torch.cat(parts) for parts in zip(*stream.map(ties), strict=True)]
    for row, equal in zip(short, positions, strict=True):
        wanted = len(equal) - found[row][1]
        tops[row] = Top(tops[row].threshold, int(equal[wanted - 1]))
    return tops


def keep(values: Tensor, top: Top, start: int) -> Tensor:
    """``values`` ``(n,)`` with everything outside ``top`` set to zero; ``start`` is their flat position."""
    if top.threshold == float("inf"):
        return torch.zeros_like(values)
    below = torch.tensor(top.threshold, dtype=values.dtype).nextafter(torch.tensor(0.0, dtype=values.dtype))
    kept = torch.nn.functional.hardshrink(values, below.item())
    if top.last is not None and start + len(values) > top.last + 1:
        tail = kept[max(0, top.last + 1 - start) :]
        tail[tail.abs() == top.threshold] = 0
    return kept


def _magnitudes_at_rank(stream: Stream, counts: Sequence[int]) -> list[tuple[float, int]]:
    """For each row the magnitude of that rank, and how many values equal to it lie beyond the rank."""
    integer = torch.int64 if stream.dtype == torch.float64 else torch.int32
    prefixes, ranks, spare = [0] * len(counts), [max(1, count) for count in counts], [0] * len(counts)
    for shift in range(integer.itemsize * 8 - _DIGIT, -1, -_DIGIT):

        def histograms(chunk: Chunk, shift: int = shift) -> Tensor:
            stack = chunk.stack.to(stream.dtype)
            return torch.stack(
                [_histogram(row, prefix, shift) for row, prefix in zip(stack, prefixes, strict=True)]
            )

        total = torch.zeros(len(counts), 1 << _DIGIT, dtype=torch.int64)
        for part in stream.map(histograms):
            total += part
        at_least = total.flip(1).cumsum(1).flip(1)
        for row, rank in enumerate(ranks):
            digit = int((at_least[row] >= rank).nonzero()[-1])
            ranks[row] = rank - int(at_least[row, digit] - total[row, digit])
            spare[row] = int(total[row, digit]) - ranks[row]
            prefixes[row] = prefixes[row] << _DIGIT | digit
    values = torch.tensor(prefixes, dtype=integer).view(stream.dtype).tolist()
    return [
        (value, left) if count else (float("inf"), 0)
        for value, left, count in zip(values, spare, counts, strict=True)
    ]


def _histogram(values: Tensor, prefix: int, shift: int) -> Tensor:
    """Counts of the 16 bits at ``shift`` among the magnitudes whose bits above them are ``prefix``."""
    integer = torch.int64 if values.dtype == torch.float64 else torch.int32
    bits = values.abs().view(integer)
    if shift + _DIGIT < integer.itemsize * 8:
        bits = bits[bits >> (shift + _DIGIT) == prefix]
    digits = (bits >> shift) & 0xFFFF
    return torch.bincount(digits, minlength=1 << _DIGIT)
