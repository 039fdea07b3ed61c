"""Exact selection of the largest magnitudes of a vector that never is in memory as a whole.

The bits of a non-negative float, read as an integer, sort as the float does. So the magnitude of a
given rank is closed in on by brackets of integers: one pass over the values counts those above the
bracket and gathers those inside it, of which there are few, because a sample has told where to look. No
sort, no copy of the vector. The sample saves passes and decides nothing: a rank that turns out to lie
outside its bracket is looked for again on that side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .stage import Chunk, Stream

_SAMPLE = 1 << 18  # values that the first brackets are guessed from, of all rows together
_HELD = 1 << 20  # values in brackets, all together, that are held before they go into histograms
_BINS = 1 << 19  # bins of all histograms together


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
    tops = [Top(float("inf")) for _ in counts]
    searches = {i: _Search(rows[i], count) for i, count in enumerate(counts) if count > 0}
    _search(stream, list(searches.values()))
    for i, found in searches.items():
        tops[i] = Top(found.value(stream.dtype))
    # Of zeros it does not matter which are selected.
    left = {i: found.within for i, found in searches.items() if exact and found.beyond and found.low}
    shared = [(i, rows[i], tops[i].threshold) for i in left]

    def ties(chunk: Chunk) -> _Parts:
        found = (np.abs(chunk.stack[row].numpy()) == value for _, row, value in shared)
        return _Parts.of([np.flatnonzero(equal) + chunk.start for equal in found])

    for parts in stream.map(ties) if shared else ():
        positions = {i: part for (i, _, _), part in zip(shared, parts.split(), strict=True)}
        for i in list(left):
            if len(positions[i]) >= left[i]:
                tops[i] = Top(tops[i].threshold, int(positions[i][left.pop(i) - 1]))
            else:
                left[i] -= len(positions[i])
        if not left:
            break
    return tops


def keep(values: Tensor, top: Top, start: int, out: Tensor | None = None) -> Tensor:
    """``values`` ``(n,)`` with everything outside ``top`` set to zero; ``start`` is their flat position."""
    out = torch.empty_like(values) if out is None else out
    if top.threshold == float("inf"):
        return out.zero_()
    split = len(values) if top.last is None else min(max(0, top.last + 1 - start), len(values))
    at_least = _just_below(top.threshold, values.dtype)
    torch.hardshrink(values[:split], at_least, out=out[:split])
    torch.hardshrink(values[split:], top.threshold, out=out[split:])
    return out


@lru_cache(maxsize=256)
def _just_below(threshold: float, dtype: torch.dtype) -> float:
    """The largest number of this dtype that is smaller than the threshold (0 for 0)."""
    near = torch.tensor(threshold, dtype=dtype)
    return (near.nextafter(torch.zeros_like(near)) if near.item() >= threshold else near).item()


def _search(stream: Stream, searches: Sequence[_Search]) -> None:
    """Find what every search is after, all of them in the same passes."""
    bits = torch.int64 if stream.dtype == torch.float64 else torch.int32
    rows = sorted({search.row for search in searches})

    def magnitudes(chunk: Chunk) -> dict[int, np.ndarray]:
        return {row: _bits_of_magnitudes(chunk.stack[row].to(stream.dtype)) for row in rows}

    if searches:
        share = _SAMPLE // len(rows)
        guesses = list(stream.sample(magnitudes, min(2 * share, max(share, stream.numel() // 64))))
        for row in rows:
            sample = np.sort(np.concatenate([guess[row] for guess in guesses]))
            for search in (search for search in searches if search.row == row):
                search.begin(sample, stream.numel(), end=1 << (8 * bits.itemsize - 1))
        del guesses
    while active := [search for search in searches if not search.found]:
        for search in active:
            search.prepare(_HELD // len(active), _BINS // len(active))

        def look(chunk: Chunk, active: Sequence[_Search] = active) -> tuple[list[int], _Parts]:
            values = magnitudes(chunk)
            looks = [search.look(values[search.row]) for search in active]
            return [above for above, _ in looks], _Parts.of([inside for _, inside in looks])

        for counts, parts in stream.map(look):
            for search, above, inside in zip(active, counts, parts.split(), strict=True):
                search.add(above, inside)
        for search in active:
            search.close_in()


@dataclass(frozen=True, slots=True)
class _Parts:
    """Arrays as one: many small ones that wait to be taken would pin the memory chunks are freed from."""

    whole: np.ndarray
    ends: Sequence[int]

    @staticmethod
    def of(arrays: Sequence[np.ndarray]) -> _Parts:
        return _Parts(np.concatenate(arrays), np.cumsum([len(array) for array in arrays]).tolist())

    def split(self) -> list[np.ndarray]:
        return np.split(self.whole, self.ends[:-1])


def _bits_of_magnitudes(values: Tensor) -> np.ndarray:
    magnitudes: np.ndarray = np.abs(values.numpy())
    return magnitudes.view(np.uint64 if values.dtype == torch.float64 else np.uint32)


class _Search:
    """The magnitude of one rank in one row, whose bits are looked for in the bracket ``[low, high)``.

    Args:
        row: of the stack.
        rank: 1 is the largest.

    Attributes:
        found: whether ``low`` is the answer.
        within, beyond: then, how many values equal to it are within the rank, and how many beyond.
    """

    def __init__(self, row: int, rank: int) -> None:
        self.row, self.rank = row, rank
        self.low = self.high = self.within = self.beyond = 0
        self.found = False

    def value(self, dtype: torch.dtype) -> float:
        """The magnitude, once it is found."""
        integer = torch.int64 if dtype == torch.float64 else torch.int32
        return torch.tensor(self.low, dtype=integer).view(dtype).item()

    def begin(self, sample: np.ndarray, numel: int, end: int) -> None:
        """Guess a bracket from a sorted sample, four standard deviations to either side of the rank."""
        self.low, self.high, self._limits = 0, end, (0, end)
        size, share = len(sample), self.rank / numel
        margin = int(4 * (size * share * (1 - share)) ** 0.5) + 4
        place = size - round(size * share)
        if place - margin >= 0:
            self.low = int(sample[place - margin])
        if place + margin < size:
            self.high = int(sample[place + margin]) + 1

    def prepare(self, room: int, bins: int) -> None:
        """Get ready for one pass: hold up to ``room`` values, then count them in up to ``bins`` bins."""
        # One array for what is held: many small ones would pin the memory that chunks are freed from.
        self._held: np.ndarray = np.empty(room, np.uint64)
        self._above = self._size = 0
        self._histogram: np.ndarray | None = None
        self._shift = max(0, (self.high - self.low - 1).bit_length() - bins.bit_length() + 1)

    def look(self, bits: np.ndarray) -> tuple[int, np.ndarray]:
        """How many values of a piece are above the bracket, and those inside, less its lower end."""
        offset = bits - bits.dtype.type(self.low)  # of what is below the bracket: huge
        return int(np.count_nonzero(bits >= self.high)), offset[offset < self.high - self.low]

    def add(self, above: int, inside: np.ndarray) -> None:
        """Take in what `look` saw in one piece."""
        self._above += above
        room = len(self._held)
        for part in (inside[start : start + room] for start in range(0, len(inside), room)):
            if self._size + len(part) > room:
                self._fold()
            self._held[self._size : self._size + len(part)] = part
            self._size += len(part)

    def _fold(self) -> None:
        """Count what is held in the histogram, and let it go."""
        bins = ((self.high - self.low - 1) >> self._shift) + 1
        digits = self._held[: self._size] >> np.uint64(self._shift)
        counts = np.bincount(digits.astype(np.intp), minlength=bins)
        if self._histogram is not None:
            counts += self._histogram
        self._histogram, self._size = counts, 0

    def close_in(self) -> None:
        """After the pass: the answer, or the next bracket: a part of this one, or what lies beside it."""
        if self._histogram is None:
            starts, counts = np.unique(self._held[: self._size], return_counts=True)
            width = 1
        else:
            self._fold()
            bins = self._histogram.nonzero()[0]
            starts, counts, width = bins << self._shift, self._histogram[bins], 1 << self._shift
        up_to = counts.cumsum()
        inside = int(counts.sum())
        position = inside - (self.rank - self._above)  # among those inside, from the smallest
        least, end = self._limits
        if position >= inside:
            self.low, self.high = self.high, end
        elif position < 0:
            self.low, self.high = least, self.low
        else:
            bin_ = int(np.searchsorted(up_to, position, side="right"))
            self.low += int(starts[bin_])
            self.high = min(self.low + width, self.high)
            self.found = width == 1
            self.within = int(up_to[bin_]) - position
            self.beyond = int(counts[bin_]) - self.within
        self._limits = self.low, self.high
        del self._held, self._histogram
