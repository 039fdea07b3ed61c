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


def find_top(
    stream: Stream, counts: Sequence[int], *, exact: bool, rows: Sequence[int] | None = None
) -> list[Top]:
    """For each request the largest magnitudes of one row of the stream's stack.

    Args:
        stream: of one tensor, or of all.
        counts: how many values to select, by request.
        exact: select exactly so many, even where equal values straddle the border (the first ones in
            the tensor win; one tensor only). Otherwise all values equal to the threshold are selected.
        rows: the row that each request is about; request i is about row i by default.
    """
    rows = range(len(counts)) if rows is None else rows
    found = _magnitudes_at_rank(stream, rows, counts)
    tops = [Top(threshold) for threshold, _, _ in found]
    # Of zeros it does not matter which are selected.
    left = {
        i: equal for i, (threshold, equal, spare) in enumerate(found) if exact and spare and threshold > 0
    }
    if not left:
        return tops

    def ties(chunk: Chunk) -> dict[int, Tensor]:
        return {
            i: (chunk.stack[rows[i]].abs() == tops[i].threshold).nonzero()[:, 0] + chunk.start for i in left
        }

    pending = dict(left)
    for positions in stream.map(ties):
        for i in list(pending):
            if len(positions[i]) >= pending[i]:
                tops[i] = Top(tops[i].threshold, int(positions[i][pending.pop(i) - 1]))
            else:
                pending[i] -= len(positions[i])
        if not pending:
            break
    return tops


def keep(values: Tensor, top: Top, start: int) -> Tensor:
    """``values`` ``(n,)`` with everything outside ``top`` set to zero; ``start`` is their flat position."""
    if top.threshold == float("inf"):
        return torch.zeros_like(values)
    kept = torch.nn.functional.hardshrink(values, _just_below(top.threshold, values.dtype))
    if top.last is not None and start + len(values) > top.last + 1:
        tail = kept[max(0, top.last + 1 - start) :]
        tail[tail.abs() == top.threshold] = 0
    return kept


def _just_below(threshold: float, dtype: torch.dtype) -> float:
    """The largest number of this dtype that is smaller than the threshold (0 for 0)."""
    near = torch.tensor(threshold, dtype=dtype)
    return (near.nextafter(torch.zeros_like(near)) if near.item() >= threshold else near).item()


def _magnitudes_at_rank(
    stream: Stream, rows: Sequence[int], counts: Sequence[int]
) -> list[tuple[float, int, int]]:
    """By request: the magnitude of that rank, and how many values equal to it lie within and beyond it.

    Requests about one row share its histograms as long as their digits agree.
    """
    integer = torch.int64 if stream.dtype == torch.float64 else torch.int32
    active = [i for i, count in enumerate(counts) if count > 0]
    prefixes, ranks, spare = [0] * len(counts), list(counts), [0] * len(counts)
    for shift in range(integer.itemsize * 8 - _DIGIT, -1, -_DIGIT) if active else ():
        wanted = sorted({(rows[i], prefixes[i]) for i in active})

        def histograms(
            chunk: Chunk, wanted: Sequence[tuple[int, int]] = wanted, shift: int = shift
        ) -> Tensor:
            stack = chunk.stack.to(stream.dtype)
            return torch.stack([_histogram(stack[row], prefix, shift) for row, prefix in wanted])

        total = torch.zeros(len(wanted), 1 << _DIGIT, dtype=torch.int64)
        for part in stream.map(histograms):
            total += part
        up_to = [line.cumsum(0) for line in total]
        for i in active:
            line = wanted.index((rows[i], prefixes[i]))
            numel = int(up_to[line][-1])
            digit = int(torch.searchsorted(up_to[line], numel - ranks[i], right=True))
            here = int(total[line, digit])
            ranks[i] -= numel - int(up_to[line][digit])
            spare[i] = here - ranks[i]
            prefixes[i] = prefixes[i] << _DIGIT | digit
    values = torch.tensor(prefixes, dtype=integer).view(stream.dtype).tolist()
    return [(values[i] if counts[i] > 0 else float("inf"), ranks[i], spare[i]) for i in range(len(counts))]


def _histogram(values: Tensor, prefix: int, shift: int) -> Tensor:
    """Counts of the 16 bits at ``shift`` among the magnitudes whose bits above them are ``prefix``."""
    integer = torch.int64 if values.dtype == torch.float64 else torch.int32
    bits = values.abs().view(integer)
    if shift + _DIGIT < integer.itemsize * 8:
        bits = bits[bits >> (shift + _DIGIT) == prefix]
    digits = (bits >> shift) & 0xFFFF
    return torch.bincount(digits, minlength=1 << _DIGIT)
